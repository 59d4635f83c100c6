/* What of an uplink's packets is the switch's; all else stays the host's.
 *
 * Ours is VXLAN to our VTEP: UDP, unfragmented, to one of our VTEP addresses and our port (RFC 7348 section 5). IPv6 is
 * ours only without extension headers, as VTEPs send it. Where peers are routed to directly, ours is also what comes
 * from an address of the cluster and goes to one of this node's pods. All with the tag of the underlay, if it has one,
 * and else without; under a tag ARP and neighbor discovery are ours too. Without a socket it passes too.
 */
#ifndef VSWITCH_UPLINK_H
#define VSWITCH_UPLINK_H

#include "bpf.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#define MAX_UPLINKS 8

/* Of each uplink, by its port. An address of all zeros is none. Bytes as on the wire. */
struct vtep {
	__u8 v6[16];
	__u8 v4[4];
	__u8 port[2];
	/* 802.1Q identifier; zero for none. */
	__u8 vlan[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_UPLINKS);
	__type(key, __u32);
	__type(value, struct vtep);
} VTEPS SEC(".maps");

/* A prefix of either family; IPv4 as IPv4-mapped IPv6. */
struct prefix {
	__u32 length;
	__u8 address[16];
};

/* Addresses of this node's pods, and of the whole cluster. Empty unless peers are routed to directly. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u8);
} LOCAL SEC(".maps"), CLUSTER SEC(".maps");

struct vlan {
	__be16 tci;
	__be16 proto;
};

#define IP_FRAGMENT 0x3fff /* more-fragments bit and offset */

static __always_inline int is_ours(void *at, void *end, __be16 proto, struct vtep *vtep)
{
	struct udphdr *udp;

	if (proto == be16(ETH_P_IP)) {
		struct iphdr *ip = at;

		if (at + sizeof(*ip) > end || ip->protocol != IPPROTO_UDP)
			return 0;
		if (ip->frag_off & be16(IP_FRAGMENT))
			return 0;
		if (!ip->daddr || ip->daddr != *(__u32 *)vtep->v4)
			return 0;
		udp = at + ip->ihl * 4;
	} else if (proto == be16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = at;
		__u64 *want = (__u64 *)vtep->v6;
		__u64 have[2];

		if (at + sizeof(*ip) > end || ip->nexthdr != IPPROTO_UDP)
			return 0;
		__builtin_memcpy(have, &ip->daddr, sizeof(have));
		if (!(have[0] | have[1]) || have[0] != want[0] || have[1] != want[1])
			return 0;
		udp = at + sizeof(*ip);
	} else {
		return 0;
	}
	if ((void *)(udp + 1) > end)
		return 0;
	return udp->dest == *(__u16 *)vtep->port;
}

static __always_inline int is_in(void *map, const void *address, __be16 proto)
{
	struct prefix key = { .length = 128 };

	if (proto == be16(ETH_P_IP)) {
		key.address[10] = 0xff;
		key.address[11] = 0xff;
		__builtin_memcpy(&key.address[12], address, 4);
	} else {
		__builtin_memcpy(key.address, address, 16);
	}
	return bpf_map_lookup_elem(map, &key) != 0;
}

static __always_inline int is_direct(void *at, void *end, __be16 proto)
{
	if (proto == be16(ETH_P_IP)) {
		struct iphdr *ip = at;

		return at + sizeof(*ip) <= end && is_in(&LOCAL, &ip->daddr, proto) && is_in(&CLUSTER, &ip->saddr, proto);
	}
	if (proto == be16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = at;

		return at + sizeof(*ip) <= end && is_in(&LOCAL, &ip->daddr, proto) && is_in(&CLUSTER, &ip->saddr, proto);
	}
	return 0;
}

/* ARP, neighbor solicitation and advertisement under a tag of our own: the kernel has no device for them. */
static __always_inline int is_neighbor(void *at, void *end, __be16 proto, __be16 vid)
{
	struct ipv6hdr *ip = at;
	__u8 *type = at + sizeof(*ip);

	if (!vid)
		return 0;
	if (proto == be16(ETH_P_ARP))
		return 1;
	return proto == be16(ETH_P_IPV6) && (void *)(type + 1) <= end && ip->nexthdr == IPPROTO_ICMPV6 &&
	       (*type == 135 || *type == 136);
}

#endif
