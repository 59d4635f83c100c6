/* The programs of the switch's links, loaded once for all of them. */
#include "fastpath.h"
#include "sockets.h"
#include "uplink.h"
#include "waiting.h"

/* The host end of a pod's veth: every packet is the switch's.
 *
 * Without a socket it waits for one if the link is at rest, and else is dropped: what a pod sends must never reach the host's
 * stack unjudged.
 */
SEC("xdp.frags")
int pod(struct xdp_md *ctx)
{
	struct link *link = link_of(ctx);
	int verdict;

	if (!link)
		return XDP_DROP;
	if (link->is_fast) {
		struct arrival from = { .port = link->port };

		verdict = forward(ctx, (void *)(long)ctx->data, &from);
		if (verdict >= 0)
			return verdict;
	}
	verdict = to_socket(ctx, link, XDP_DROP);
	if (verdict == XDP_REDIRECT || await_socket(ctx))
		return verdict;
	/* It may have been woken since its sockets were looked for. */
	link = link_of(ctx);
	return link ? to_socket(ctx, link, XDP_DROP) : XDP_DROP;
}

/* A NIC of the host: only what is ours goes to the switch. Without a socket it passes, too. */
SEC("xdp.frags")
int uplink(struct xdp_md *ctx)
{
	void *at = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct link *link = link_of(ctx);
	struct ethhdr *eth = at;
	__be16 proto, vid = 0;
	struct vtep *vtep;

	if (!link)
		return XDP_PASS;
	vtep = bpf_map_lookup_elem(&VTEPS, &link->port);
	if (!vtep || at + sizeof(*eth) > end)
		return XDP_PASS;
	proto = eth->h_proto;
	at += sizeof(*eth);
	if (proto == be16(ETH_P_8021Q)) {
		struct vlan *vlan = at;

		if (at + sizeof(*vlan) > end)
			return XDP_PASS;
		proto = vlan->proto;
		vid = vlan->tci & be16(0x0fff);
		at += sizeof(*vlan);
	}
	if (vid != *(__u16 *)vtep->vlan)
		return XDP_PASS;
	if (is_ours(at, end, proto, vtep)) {
		if (link->is_fast && proto == be16(ETH_P_IP) && !vid) {
			int verdict = forward_inner(ctx, at, link->port);

			if (verdict >= 0)
				return verdict;
		}
	} else if (!is_neighbor(at, end, proto, vid) && !is_direct(at, end, proto)) {
		return XDP_PASS;
	}
	return to_socket(ctx, link, XDP_PASS);
}
