//! Why a packet ended: one closed enum, one metric label per variant; the same word in logs, status and docs.
//! Who counts them: `proto::account`.

/// Why a packet was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// Not a well-formed IP packet, or its transport header is cut off.
    Malformed,
    /// Link-scope, multicast, loopback or unspecified address on `tenc0`.
    LinkScope,
    /// A captured packet that bears our own tunnel port: it would be sealed for ever.
    Loop,
    /// The destination is protected, but no workload of the directory answers to it.
    UnknownDestination,
    /// The Service has no such port, or the directory does not know the VIP.
    ServiceUnknown,
    /// The Service has no ready workload endpoint.
    NoEndpoint,
    /// The peer did not answer the handshake in time.
    PeerSilent,
    /// The peer left the directory; counts its packets, and the connections that were reset for it.
    PeerGone,
    /// Of the packets that wait for their turn there were too many, and most of them of its flow.
    Congested,
    /// A bounded queue for staged or held packets was full.
    QueueFull,
    /// A held packet waited for the directory or a session longer than it may.
    HeldTooLong,
    /// The flow table is full.
    FlowTableFull,
    /// A fragment whose first fragment was not seen in time.
    FragmentUnmatched,
    /// A sealed packet would not fit the path.
    TooBig,
    /// A datagram that is no message of the protocol.
    NotWireguard,
    /// MAC1 of a handshake message is wrong: another key domain, or noise.
    BadMac1,
    /// Handshake message that does not decrypt, or a static key that is not its sender's.
    HandshakeInvalid,
    /// Handshake from a static key that the directory does not know (the newest are kept for a while).
    PeerUnknown,
    /// A handshake time stamp not newer than the last one.
    HandshakeReplay,
    /// A handshake time stamp too far in the future.
    ClockSkew,
    /// Handshakes faster than a peer may send them.
    HandshakeFlood,
    /// Under load: a handshake message whose sender has yet to show, by a cookie, that it receives where it sends from.
    CookieMissing,
    /// Under load: handshakes faster than one source may send them.
    SourceLimit,
    /// No session has this receiver index.
    IndexUnknown,
    /// Session older than its hard limit, or its message counter used up.
    SessionExpired,
    /// Authentication of a data message failed.
    BadTag,
    /// A counter that was used already or fell out of the window.
    Replay,
    /// The outer source is not the peer's own address.
    OuterSource,
    /// The inner source is neither the peer's address nor a VIP flow pinned to it.
    NotOwner,
    /// The inner destination is neither our address nor a VIP we are an endpoint of.
    NotForUs,
    /// The inner source is a VIP that is not protected any more: the pod's answer would leave in clear.
    SourceReleased,
    /// The DNS message is not well-formed, or belongs to no query.
    DnsMalformed,
    /// An answer to a question in the zone that cannot be parsed completely.
    DnsUnparsed,
    /// An answer leads a name of the project's zone out of the project, and the directory does not.
    DnsContradicted,
    /// More DNS queries in flight than the agent keeps.
    DnsOverload,
    /// Nobody answered a forwarded DNS query.
    DnsTimeout,
    /// The kernel refused the datagram or the injected packet.
    KernelRefused,
    /// A TCP connection to an address, older than its protection; counts connections, and refused segments of them.
    Preexisting,
    /// It waited in an agent that ended without notice.
    AgentEnded,
}

impl DropReason {
    /// Every variant, in declaration order.
    pub const ALL: [Self; 39] = [
        Self::Malformed,
        Self::LinkScope,
        Self::Loop,
        Self::UnknownDestination,
        Self::ServiceUnknown,
        Self::NoEndpoint,
        Self::PeerSilent,
        Self::PeerGone,
        Self::Congested,
        Self::QueueFull,
        Self::HeldTooLong,
        Self::FlowTableFull,
        Self::FragmentUnmatched,
        Self::TooBig,
        Self::NotWireguard,
        Self::BadMac1,
        Self::HandshakeInvalid,
        Self::PeerUnknown,
        Self::HandshakeReplay,
        Self::ClockSkew,
        Self::HandshakeFlood,
        Self::CookieMissing,
        Self::SourceLimit,
        Self::IndexUnknown,
        Self::SessionExpired,
        Self::BadTag,
        Self::Replay,
        Self::OuterSource,
        Self::NotOwner,
        Self::NotForUs,
        Self::SourceReleased,
        Self::DnsMalformed,
        Self::DnsUnparsed,
        Self::DnsContradicted,
        Self::DnsOverload,
        Self::DnsTimeout,
        Self::KernelRefused,
        Self::Preexisting,
        Self::AgentEnded,
    ];

    /// The word used in logs, status, metrics and docs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::LinkScope => "link_scope",
            Self::Loop => "loop",
            Self::UnknownDestination => "unknown_destination",
            Self::ServiceUnknown => "service_unknown",
            Self::NoEndpoint => "no_endpoint",
            Self::PeerSilent => "peer_silent",
            Self::PeerGone => "peer_gone",
            Self::Congested => "congested",
            Self::QueueFull => "queue_full",
            Self::HeldTooLong => "held_too_long",
            Self::FlowTableFull => "flow_table_full",
            Self::FragmentUnmatched => "fragment_unmatched",
            Self::TooBig => "too_big",
            Self::NotWireguard => "not_wireguard",
            Self::BadMac1 => "bad_mac1",
            Self::HandshakeInvalid => "handshake_invalid",
            Self::PeerUnknown => "peer_unknown",
            Self::HandshakeReplay => "handshake_replay",
            Self::ClockSkew => "clock_skew",
            Self::HandshakeFlood => "handshake_flood",
            Self::CookieMissing => "cookie_missing",
            Self::SourceLimit => "source_limit",
            Self::IndexUnknown => "index_unknown",
            Self::SessionExpired => "session_expired",
            Self::BadTag => "bad_tag",
            Self::Replay => "replay",
            Self::OuterSource => "outer_source",
            Self::NotOwner => "not_owner",
            Self::NotForUs => "not_for_us",
            Self::SourceReleased => "source_released",
            Self::DnsMalformed => "dns_malformed",
            Self::DnsUnparsed => "dns_unparsed",
            Self::DnsContradicted => "dns_contradicted",
            Self::DnsOverload => "dns_overload",
            Self::DnsTimeout => "dns_timeout",
            Self::KernelRefused => "kernel_refused",
            Self::Preexisting => "preexisting",
            Self::AgentEnded => "agent_ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_word_and_slot() {
        for (i, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
        }
        let words: std::collections::BTreeSet<_> = DropReason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(words.len(), DropReason::ALL.len());
    }
}
