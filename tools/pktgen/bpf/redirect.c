/* Sends everything that comes in at a link out of another one: what the kernel can do at most. */
#include "bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} OTHER SEC(".maps");

SEC("xdp.frags")
int redirect(struct xdp_md *ctx)
{
	return bpf_redirect_map(&OTHER, 0, XDP_ABORTED);
}
