/* Sends everything that comes in at a link out of another one: what the kernel can do at most. */
#include "bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} OTHER SEC(".maps");

/* Packets and bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64[2]);
} COUNT SEC(".maps");

SEC("xdp.frags")
int redirect(struct xdp_md *ctx)
{
	__u32 key = 0;
	__u64 *count = bpf_map_lookup_elem(&COUNT, &key);

	if (count) {
		count[0]++;
		count[1] += ctx->data_end - ctx->data;
	}
	return bpf_redirect_map(&OTHER, 0, XDP_ABORTED);
}
