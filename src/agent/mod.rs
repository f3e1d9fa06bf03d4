//! agent.

pub mod guard;
pub mod neighbour;
pub mod netlink;
pub mod raw_socket;
pub mod tun;
pub mod udp;
