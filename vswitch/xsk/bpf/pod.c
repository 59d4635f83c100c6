/* The program of a pod port: every packet goes to the socket of its queue.
 *
 * Without a socket it is dropped: what a pod sends must never reach the host's stack unjudged.
 */
#include "sockets.h"

SEC("xdp.frags")
int pod(struct xdp_md *ctx)
{
	return bpf_redirect_map(&SOCKETS, ctx->rx_queue_index, XDP_DROP);
}
