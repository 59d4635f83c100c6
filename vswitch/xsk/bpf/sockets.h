/* Links of the switch, and where their packets go: one AF_XDP socket a receive queue. */
#ifndef VSWITCH_SOCKETS_H
#define VSWITCH_SOCKETS_H

#include "bpf.h"

#define MAX_LINKS 4096
#define MAX_QUEUES 64

/* An empty slot means that no worker owns the queue. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_LINKS * MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} SOCKETS SEC(".maps");

/* What the switch knows of a link. */
struct link {
	/* Its place in SOCKETS, of MAX_QUEUES. */
	__u32 place;
	/* Its port, as in a flow's key. */
	__u32 port;
	/* Whether flows may be forwarded here. */
	__u32 is_fast;
	/* Whether it is without sockets for now: see waiting.h. */
	__u32 rest;
};

/* By interface index. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_LINKS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct link);
} LINKS SEC(".maps");

static __always_inline struct link *link_of(struct xdp_md *ctx)
{
	__u32 ifindex = ctx->ingress_ifindex;

	return bpf_map_lookup_elem(&LINKS, &ifindex);
}

/* To the socket of the packet's queue; without one, `otherwise`. */
static __always_inline int to_socket(struct xdp_md *ctx, const struct link *link, int otherwise)
{
	__u32 queue = ctx->rx_queue_index;

	if (queue >= MAX_QUEUES)
		return otherwise;
	return bpf_redirect_map(&SOCKETS, link->place * MAX_QUEUES + queue, otherwise);
}

#endif
