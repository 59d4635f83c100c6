/* Links at rest have no sockets. What comes from one waits here, in a ring that all links share, until it has some again. */
#ifndef VSWITCH_WAITING_H
#define VSWITCH_WAITING_H

#include "sockets.h"

/* Room for the bytes of a packet: most that are the first after a silence are small; none is larger than an IP packet of
 * 65,535 bytes with its Ethernet header and a tag.
 */
#define SMALL_PACKET 1520
#define LARGE_PACKET 65568

/* What `rest` of a link says. */
#define REST_NONE 0
/* Its packets wait. */
#define REST_WAITS 1
/* It cannot have sockets for now: its packets are lost. */
#define REST_DEAF 2

struct waiting {
	__u32 port;
	__u32 queue;
	__u32 length;
	__u32 unused;
	__u8 bytes[];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} WAITING SEC(".maps");

/* Packets that found no room to wait, by the place of their link. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_LINKS);
	__type(key, __u32);
	__type(value, __u64);
} LOST SEC(".maps");

/* False if there is no room. `room` is a constant, as the kernel wants it. */
static __always_inline int keep(struct xdp_md *ctx, const struct link *link, __u64 length, const __u32 room)
{
	struct waiting *waiting = bpf_ringbuf_reserve(&WAITING, sizeof(*waiting) + room, 0);

	if (!waiting)
		return 0;
	waiting->port = link->port;
	waiting->queue = ctx->rx_queue_index;
	waiting->length = length;
	waiting->unused = 0;
	if (length < 1 || length > room || bpf_xdp_load_bytes(ctx, 0, waiting->bytes, length)) {
		bpf_ringbuf_discard(waiting, 0);
		return 0;
	}
	bpf_ringbuf_submit(waiting, 0);
	return 1;
}

static __always_inline int keep_any(struct xdp_md *ctx, const struct link *link)
{
	__u64 length = bpf_xdp_get_buff_len(ctx);

	return length <= SMALL_PACKET ? keep(ctx, link, length, SMALL_PACKET) : keep(ctx, link, length, LARGE_PACKET);
}

/* Of a packet without a socket: if the link rests, a copy is kept, and with that its sockets are called for. False if it does
 * not rest.
 */
static __always_inline int await_socket(struct xdp_md *ctx)
{
	/* Anew: it may have gone to rest since it was looked up. */
	struct link *link = link_of(ctx);
	__u32 place;
	__u64 *lost;

	if (!link || link->rest == REST_NONE)
		return 0;
	if (link->rest == REST_WAITS && keep_any(ctx, link))
		return 1;
	place = link->place;
	lost = bpf_map_lookup_elem(&LOST, &place);
	if (lost)
		__sync_fetch_and_add(lost, 1);
	return 1;
}

#endif
