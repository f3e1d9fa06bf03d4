//! System calls that neither nix, rustix nor socket2 offers in a safe form: the only folder with `unsafe`.
//!
//! Each file wraps one kind of kernel object; a safe function comes out.

pub mod async_fd;
pub mod exec;
pub mod fd;
pub mod memory;
pub mod netns;
pub mod packet;
pub mod tun;
pub mod udp;
