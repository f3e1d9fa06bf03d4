//! sys.

pub mod async_fd;
pub mod netns;
