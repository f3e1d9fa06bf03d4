//! System calls that nix and rustix lack, behind safe functions. The only folder with `unsafe`.
#![expect(unsafe_code, reason = "this folder is where it may stand")]

pub mod exec;
pub mod netns;
pub mod packet;
pub mod tun;
pub mod udp;
