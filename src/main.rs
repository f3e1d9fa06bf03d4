//! argv to sub-command to exit code.
fn main() {}
