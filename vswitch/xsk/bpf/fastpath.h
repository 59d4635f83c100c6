/* Flows that the switch has judged, forwarded here: MAC addresses, one hop less, VXLAN on or off, out of another link.
 *
 * The switch writes what becomes of a flow (xsk/src/fastpath.rs); here it is done if the packet is like those that were
 * judged, and nothing about it is unusual. All else is left as it is, for the poll loop: what opens or closes a
 * connection, fragments, options of IP, damage, other sizes, and a checksum that is left to the device where packets may be too
 * large to be summed here. A flow holds for one generation, which the switch counts up with every change, and for some
 * seconds.
 */
#ifndef VSWITCH_FASTPATH_H
#define VSWITCH_FASTPATH_H

#include "bpf.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define OUTER_BYTES 50 /* Ethernet, IPv4, UDP and VXLAN (RFC 7348 section 5) */

#define FLOW_ROUTED 1 /* MAC addresses change, and one hop is used */
#define FLOW_ENCAP 2
#define FLOW_SEQUENCED 4 /* TCP: sequence numbers are followed */
#define FLOW_COMPLETE 8 /* a checksum that is left to the device is completed: no packet is larger than MAX_SUM */
#define FLOW_FRAGS 16 /* the other link takes packets of several frames */

#define MAX_SUM 3584
#define SUM_STEP 512 /* the most that bpf_csum_diff took before Linux 6.13 */

/* What its packets look like; `FastKey`. Ports and addresses as on the wire. */
struct flow_key {
	__u16 port;
	__u8 kind; /* 4 or 6 */
	__u8 protocol;
	__u32 vni; /* 0 from a pod */
	__be32 vtep; /* who encapsulated it */
	__be16 ports[2];
	__be32 source[4];
	__be32 destination[4];
};

#define KEY_WORDS 6 /* of 8 bytes */

/* What becomes of them; `FastFlow`. Three cache lines: what is compared, what is done, the headers before it. */
struct flow {
	__u64 key[KEY_WORDS];
	__u32 generation;
	__u32 flags;
	__u64 expires_ns;

	__u64 match_macs; /* the first 8 bytes of the Ethernet header, */
	__u32 match_rest; /* and the next 4 */
	__u32 max_bytes;
	__u64 macs;
	__u32 macs_rest;
	__u32 ifindex;
	__u64 packets;
	__u64 bytes;
	__u32 seq;
	__u32 window_bits;
	__u64 unused;

	__u8 outer[OUTER_BYTES];
	__u8 rest[14];
};

#define WAYS 4

/* Flows whose hashes are alike. */
struct bucket {
	struct flow ways[WAYS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct bucket);
} FLOWS SEC(".maps");

struct table {
	__u32 generation; /* the one in force */
	__u32 mask; /* of the number of buckets */
	__u64 seed;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct table);
} TABLE SEC(".maps");

/* Room to sum a packet in. */
struct scratch {
	__u8 bytes[MAX_SUM + SUM_STEP];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} SCRATCH SEC(".maps");

/* How a packet came. */
struct arrival {
	__u32 port;
	__be32 vtep;
	__u32 vni;
	__u8 ecn; /* of the outer header */
};

/* Words that may lie anywhere in a packet. */
static __always_inline __u64 read64(const void *at)
{
	return *(const __u64 *)at;
}

static __always_inline __u32 read32(const void *at)
{
	return *(const __u32 *)at;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The sum of an IPv4 header without options; 0xffff if it is intact (RFC 1071). */
static __always_inline __u16 header_sum(const void *ip)
{
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += read32(ip + 4 * i);
	return fold(sum);
}

/* What is said of a TCP or UDP header, for the lookup and after it. */
struct layer4 {
	__u32 seq;
	__u64 pseudo; /* sum of the pseudo-header */
	__u32 bytes;
	__u8 is_partial; /* the rest of the checksum is left to the device */
};

/* False for what the poll loop must see. */
static __always_inline int read_layer4(void *at, void *end, struct flow_key *key, struct layer4 *l4)
{
	__u16 partial = fold(l4->pseudo + be16(key->protocol) + be16(l4->bytes));

	if (key->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = at;

		if ((void *)(tcp + 1) > end || tcp->doff < 5 || tcp->doff * 4 > l4->bytes)
			return 0;
		if (tcp->syn || tcp->fin || tcp->rst || tcp->urg || !tcp->ack)
			return 0;
		l4->is_partial = tcp->check == partial;
		key->ports[0] = tcp->source;
		key->ports[1] = tcp->dest;
		l4->seq = __builtin_bswap32(tcp->seq);
		return 1;
	}
	if (key->protocol == IPPROTO_UDP) {
		struct udphdr *udp = at;

		if ((void *)(udp + 1) > end || be16(udp->len) != l4->bytes)
			return 0;
		if (!udp->check && key->kind == 6)
			return 0;
		l4->is_partial = udp->check == partial;
		key->ports[0] = udp->source;
		key->ports[1] = udp->dest;
		l4->seq = 0;
		return 1;
	}
	return 0;
}

/* `bytes` is what the packet has from `at` on, the first frame ends at `end`. */
static __always_inline int read_packet(void *at, void *end, __u32 bytes, struct flow_key *key, struct layer4 *l4,
				       __u8 *hops, __u8 *ecn)
{
	struct ethhdr *eth = at;

	if (at + sizeof(*eth) + sizeof(struct iphdr) > end)
		return 0;
	if (eth->h_proto == be16(ETH_P_IP)) {
		struct iphdr *ip = at + sizeof(*eth);
		__u32 total = be16(ip->tot_len);

		if (*(__u8 *)ip != 0x45 || (ip->frag_off & be16(0x3fff)) || header_sum(ip) != 0xffff)
			return 0;
		if (total < sizeof(*ip) || sizeof(*eth) + total != bytes)
			return 0;
		key->kind = 4;
		key->protocol = ip->protocol;
		key->source[0] = ip->saddr;
		key->destination[0] = ip->daddr;
		*hops = ip->ttl;
		*ecn = ip->tos & 3;
		l4->pseudo = (__u64)ip->saddr + ip->daddr;
		l4->bytes = total - sizeof(*ip);
		return read_layer4(ip + 1, end, key, l4);
	}
	if (eth->h_proto == be16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = at + sizeof(*eth);
		__u32 payload;

		if ((void *)(ip + 1) > end || ip->version != 6)
			return 0;
		payload = be16(ip->payload_len);
		if (sizeof(*eth) + sizeof(*ip) + payload != bytes)
			return 0;
		key->kind = 6;
		key->protocol = ip->nexthdr;
		l4->pseudo = 0;
#pragma unroll
		for (int i = 0; i < 4; i++) {
			key->source[i] = ip->saddr.in6_u.u6_addr32[i];
			key->destination[i] = ip->daddr.in6_u.u6_addr32[i];
			l4->pseudo += (__u64)key->source[i] + key->destination[i];
		}
		*hops = ip->hop_limit;
		*ecn = *((__u8 *)ip + 1) >> 4 & 3;
		l4->bytes = payload;
		return read_layer4(ip + 1, end, key, l4);
	}
	return 0;
}

/* `FastKey::hash`. */
static __always_inline __u64 hash_of(const __u64 *key, __u64 seed)
{
	__u64 one = seed, two = ~seed;

#pragma unroll
	for (int i = 0; i < KEY_WORDS; i += 2) {
		one = (one ^ key[i]) * 0x9e3779b97f4a7c15ull;
		two = (two ^ key[i + 1]) * 0xbf58476d1ce4e5b9ull;
		one ^= one >> 32;
		two ^= two >> 32;
	}
	one = (one ^ two) * 0x94d049bb133111ebull;
	return one ^ one >> 32;
}

/* True if this is the flow, and it holds.
 *
 * What is compared is read after the generation, whatever the processor would like to do: its address depends on it.
 */
static __always_inline int is_flow(const struct flow *flow, const __u64 *key, __u32 generation, __u64 now)
{
	__u64 zero = *(volatile __u32 *)&flow->generation, different = 0;

	if (zero != generation)
		return 0;
	asm volatile("%0 &= 0" : "+r"(zero));
	flow = (void *)flow + zero;
#pragma unroll
	for (int i = 0; i < KEY_WORDS; i++)
		different |= flow->key[i] ^ key[i];
	return !different && flow->expires_ns > now;
}

/* The flow that a packet is of, if it may be forwarded by it. */
static __always_inline struct flow *find_flow(const struct flow_key *packet, const void *at, __u32 bytes, __u8 hops, __u32 seq)
{
	const __u64 *key = (const __u64 *)packet;
	struct flow *flow = 0;
	struct bucket *bucket;
	struct table *table;
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 zero = 0, place;

	table = bpf_map_lookup_elem(&TABLE, &zero);
	if (!table)
		return 0;
	place = hash_of(key, table->seed) & table->mask;
	bucket = bpf_map_lookup_elem(&FLOWS, &place);
	if (!bucket)
		return 0;
#pragma unroll
	for (int i = 0; i < WAYS; i++)
		if (is_flow(&bucket->ways[i], key, table->generation, now)) {
			flow = &bucket->ways[i];
			break;
		}
	if (!flow)
		return 0;
	if (flow->match_macs != read64(at) || flow->match_rest != read32(at + 8) || bytes > flow->max_bytes)
		return 0;
	if ((flow->flags & FLOW_ROUTED) && hops <= 1)
		return 0;
	if (flow->flags & FLOW_SEQUENCED) {
		__s32 distance = seq - flow->seq;

		if ((distance < 0 ? -distance : distance) >> (flow->window_bits & 31))
			return 0;
		if (distance > 0)
			flow->seq = seq;
	}
	return flow;
}

/* Completes the checksum of a packet whose layer 4 begins at `offset`; false if it cannot be, and then nothing was changed. */
static __always_inline int complete(struct xdp_md *ctx, void *layer4, void *end, __u32 offset, __u32 bytes, __u8 protocol)
{
	__u32 zero = 0, sum = 0, field = protocol == IPPROTO_TCP ? 16 : 6;
	struct scratch *scratch = bpf_map_lookup_elem(&SCRATCH, &zero);
	__u16 *check = layer4 + field;

	if (!scratch || !bytes || bytes > MAX_SUM || (void *)(check + 1) > end)
		return 0;
	if (bpf_xdp_load_bytes(ctx, offset, scratch->bytes, bytes))
		return 0;
	/* Sums go by words of four bytes; `bytes` is at most MAX_SUM. */
	*(__u32 *)(scratch->bytes + (bytes & 0xfff)) = 0;
	bytes = (bytes + 3) & ~3;
	for (int i = 0; i < MAX_SUM / SUM_STEP; i++) {
		__u64 step = bytes;

		/* The verifier wants the very register compared that is used. */
		asm volatile("" : "+r"(step));
		if (step > SUM_STEP)
			step = SUM_STEP;
		if (!step)
			break;
		sum = bpf_csum_diff(0, 0, scratch->bytes + i * SUM_STEP, step, sum);
		bytes -= step;
	}
	sum = (__u16)~fold(sum);
	*check = sum || protocol == IPPROTO_TCP ? sum : 0xffff;
	return 1;
}

/* One hop less (RFC 1812 section 5.3.1), and the checksum that covers it (RFC 1624). */
static __always_inline void use_hop(void *at, __u8 kind)
{
	if (kind == 4) {
		struct iphdr *ip = at + ETH_HLEN;
		__u32 sum = ip->check + be16(0x0100);

		ip->check = sum + (sum >= 0xffff);
		ip->ttl--;
	} else {
		struct ipv6hdr *ip = at + ETH_HLEN;

		ip->hop_limit--;
	}
}

/* Writes the headers of VXLAN before the inner frame at `at + OUTER_BYTES`. */
static __always_inline void write_outer(void *at, const struct flow *flow, __u32 inner, __u8 ecn)
{
	struct iphdr *ip = at + ETH_HLEN;
	struct udphdr *udp = (void *)(ip + 1);

#pragma unroll
	for (int i = 0; i < 6; i++)
		*(__u64 *)(at + 8 * i) = *(const __u64 *)(flow->outer + 8 * i);
	*(__u16 *)(at + 48) = *(const __u16 *)(flow->outer + 48);
	ip->tos = ecn;
	ip->tot_len = be16(inner + OUTER_BYTES - ETH_HLEN);
	ip->check = 0;
	ip->check = ~header_sum(ip);
	udp->len = be16(inner + OUTER_BYTES - ETH_HLEN - sizeof(*ip));
}

/* Forwards the packet whose own Ethernet header is at `at`; -1 if the poll loop has to, and then the packet says what it said. */
static __always_inline int forward(struct xdp_md *ctx, void *at, const struct arrival *from)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct flow_key key __attribute__((aligned(8))) = { .port = from->port, .vni = from->vni, .vtep = from->vtep };
	__u32 bytes = bpf_xdp_get_buff_len(ctx), offset = at - data, inner = bytes - offset;
	struct layer4 l4;
	struct flow *flow;
	__u8 hops, ecn;

	if (!read_packet(at, end, inner, &key, &l4, &hops, &ecn))
		return -1;
	/* What was marked on the way must be marked inside (RFC 6040 section 4.2). */
	if (from->ecn && from->ecn != ecn)
		return -1;
	flow = find_flow(&key, at, inner, hops, l4.seq);
	if (!flow)
		return -1;
	if (bytes != end - data && !(flow->flags & FLOW_FRAGS))
		return -1;
	if (l4.is_partial) {
		__u32 before = inner - l4.bytes;

		if (!(flow->flags & FLOW_COMPLETE))
			return -1;
		if (key.kind == 4) {
			if (!complete(ctx, at + 34, end, offset + before, l4.bytes, key.protocol))
				return -1;
		} else if (!complete(ctx, at + 54, end, offset + before, l4.bytes, key.protocol)) {
			return -1;
		}
	}
	if (flow->flags & FLOW_ENCAP) {
		if (bpf_xdp_adjust_head(ctx, -OUTER_BYTES))
			return -1;
		data = (void *)(long)ctx->data;
		end = (void *)(long)ctx->data_end;
		at = data + OUTER_BYTES;
		if (at + ETH_HLEN + sizeof(struct iphdr) > end)
			return XDP_DROP;
		write_outer(data, flow, inner, ecn);
	}
	if (flow->flags & FLOW_ROUTED) {
		*(__u64 *)at = flow->macs;
		*(__u32 *)(at + 8) = flow->macs_rest;
		use_hop(at, key.kind);
	}
	if (from->vni && bpf_xdp_adjust_head(ctx, OUTER_BYTES))
		return XDP_DROP;
	/* Who has read the packets finds their bytes. */
	__sync_fetch_and_add(&flow->bytes, bytes);
	__sync_fetch_and_add(&flow->packets, 1);
	return bpf_redirect(flow->ifindex, 0);
}

/* Forwards what came in VXLAN from another node, as [`forward`]. `at` is where the outer IPv4 header begins. */
static __always_inline int forward_inner(struct xdp_md *ctx, void *at, __u32 port)
{
	void *end = (void *)(long)ctx->data_end;
	struct arrival from = { .port = port };
	struct iphdr *ip = at;
	struct udphdr *udp = (void *)(ip + 1);
	__u32 *vxlan = (void *)(udp + 1);

	if ((void *)(vxlan + 2) > end || *(__u8 *)ip != 0x45 || header_sum(ip) != 0xffff)
		return -1;
	/* Of one frame, as it is on a wire. */
	if (at + be16(ip->tot_len) != end || bpf_xdp_get_buff_len(ctx) != end - (void *)(long)ctx->data || be16(udp->len) != be16(ip->tot_len) - sizeof(*ip))
		return -1;
	/* The VNI flag, and no other. */
	if (vxlan[0] != __builtin_bswap32(0x08000000))
		return -1;
	from.vtep = ip->saddr;
	from.vni = __builtin_bswap32(vxlan[1]) >> 8;
	from.ecn = ip->tos & 3;
	if (!from.vni)
		return -1;
	return forward(ctx, vxlan + 2, &from);
}

#endif
