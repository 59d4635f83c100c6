/* Counts the packets of a link and drops them; of stamped ones it keeps how long they took, as a histogram. */
#include "bpf.h"
#include "stamp.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

struct count {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct count);
} COUNT SEC(".maps");

/* 64 steps for each doubling: a value is told within 1.6 %. */
#define STEP_BITS 6
#define STEPS (1 << STEP_BITS)
#define BUCKETS (40 * STEPS)

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, BUCKETS);
	__type(key, __u32);
	__type(value, __u64);
} LATENCY SEC(".maps");

static __always_inline __u32 bucket_of(__u64 ns)
{
	__u32 shift = 0;
	__u64 rest = ns >> STEP_BITS;

#pragma unroll
	for (int bits = 32; bits; bits >>= 1) {
		if (rest >> bits) {
			rest >>= bits;
			shift += bits;
		}
	}
	/* `rest` is 0 or 1 now; below 64 ns a bucket is a nanosecond. */
	if (!rest)
		return ns;
	return (shift + 1) * STEPS + (__u32)((ns >> shift) - STEPS);
}

SEC("xdp.frags")
int count(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct stamp *stamp;
	struct count *count;
	__u32 at = 0;
	__u64 *bucket;

	/* What is not IP is not counted, and goes on: ARP and its kin. */
	if ((void *)(eth + 1) > end)
		return XDP_PASS;
	if (eth->h_proto == be16(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_UDP)
			return XDP_PASS;
		stamp = (void *)(ip + 1) + sizeof(struct udphdr);
	} else if (eth->h_proto == be16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_UDP)
			return XDP_PASS;
		stamp = (void *)(ip + 1) + sizeof(struct udphdr);
	} else {
		return XDP_PASS;
	}
	count = bpf_map_lookup_elem(&COUNT, &at);
	if (!count)
		return XDP_ABORTED;
	count->packets++;
	count->bytes += bpf_xdp_get_buff_len(ctx);
	if ((void *)(stamp + 1) <= end && stamp->magic == STAMP) {
		at = bucket_of(bpf_ktime_get_ns() - stamp->sent_ns);
		bucket = bpf_map_lookup_elem(&LATENCY, &at);
		if (bucket)
			++*bucket;
	}
	return XDP_DROP;
}
