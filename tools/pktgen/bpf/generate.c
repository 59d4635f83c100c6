/* Makes packets in the kernel: run over live frames by BPF_PROG_TEST_RUN, each is written and redirected to a link.
 *
 * A packet is one of the templates, by a repeated pattern, with the ports of the next flow, and now and then a time stamp.
 * Between packets that are due the frames of the run are dropped, which is how a rate is kept.
 */
#include "bpf.h"
#include "stamp.h"

#define MAX_TEMPLATES 4
#define MAX_HEADERS 160
#define MAX_PATTERN 16
#define MAX_LATE_NS 100000

/* A packet's first bytes, written by the loader, and where they change. All sums are of 16-bit words as they lie. */
struct template {
	__u32 size;
	__u16 headers;
	/* Where the UDP ports are; the checksum is 6 bytes on. */
	__u16 ports;
	/* Where the outer UDP source port is; zero without VXLAN. */
	__u16 entropy;
	/* Where a time stamp goes; zero for nowhere. */
	__u16 stamp;
	/* Of the checksum, with ports and stamp of zero. */
	__u32 sum;
	__u8 bytes[MAX_HEADERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TEMPLATES);
	__type(key, __u32);
	__type(value, struct template);
} TEMPLATES SEC(".maps");

struct settings {
	__u32 ifindex;
	/* Of the frames that the run gives. */
	__u32 size;
	__u32 flows;
	__u32 pattern_length;
	/* One packet in so many has a stamp; zero for none. */
	__u32 stamp_every;
	__u16 first_source;
	__u16 first_destination;
	/* Source ports in use before the next destination port. */
	__u32 sources;
	__u32 unused;
	/* Time a packet, in 1/65,536 ns; zero for as fast as it goes. */
	__u64 interval;
	__u8 pattern[MAX_PATTERN];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} SETTINGS SEC(".maps");

/* One core runs it at a time. */
struct progress {
	__u64 packets;
	__u64 bytes;
	/* When the first packet was due, as seen from the last. */
	__u64 start_ns;
	__u32 flow;
	__u32 place;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct progress);
} PROGRESS SEC(".maps");

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	__u32 zero = 0, which, sum, words = 0;
	struct settings *settings = bpf_map_lookup_elem(&SETTINGS, &zero);
	struct progress *progress = bpf_map_lookup_elem(&PROGRESS, &zero);
	struct template *template;
	__u16 source, destination;
	void *data, *end;
	__u64 now = 0;

	if (!settings || !progress)
		return XDP_ABORTED;
	if (settings->interval || settings->stamp_every)
		now = bpf_ktime_get_ns();
	if (settings->interval) {
		__u64 due;

		if (!progress->start_ns)
			progress->start_ns = now;
		due = progress->start_ns + ((progress->packets * settings->interval) >> 16);
		if (now < due)
			return XDP_DROP;
		/* What was missed is not caught up with: a burst would be another experiment. */
		if (now > due + MAX_LATE_NS)
			progress->start_ns += now - due - MAX_LATE_NS;
	}
	which = settings->pattern[progress->place & (MAX_PATTERN - 1)];
	template = bpf_map_lookup_elem(&TEMPLATES, &which);
	if (!template)
		return XDP_ABORTED;
	if (template->size != settings->size && bpf_xdp_adjust_tail(ctx, (int)template->size - (int)settings->size))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;

	/* Headers in words of eight bytes, as far as the packet goes. */
#pragma unroll
	for (int at = 0; at < MAX_HEADERS; at += 8) {
		if (at >= template->headers || data + at + 8 > end)
			break;
		*(__u64 *)(data + at) = *(__u64 *)(template->bytes + at);
	}
	if (template->stamp && settings->stamp_every && progress->packets % settings->stamp_every == 0) {
		struct stamp *stamp = data + (template->stamp & 0xff);

		if ((void *)(stamp + 1) > end)
			return XDP_ABORTED;
		stamp->magic = STAMP;
		stamp->sent_ns = now;
		words = (__u32)(STAMP & 0xffff) + (STAMP >> 16 & 0xffff) + (STAMP >> 32 & 0xffff) + (STAMP >> 48);
		words += (now & 0xffff) + (now >> 16 & 0xffff) + (now >> 32 & 0xffff) + (now >> 48);
	}
	source = be16(settings->first_source + progress->flow % settings->sources);
	destination = be16(settings->first_destination + progress->flow / settings->sources);
	{
		__u16 *ports = data + (template->ports & 0xff);

		if ((void *)(ports + 4) > end)
			return XDP_ABORTED;
		sum = (__u16)~fold(template->sum + source + destination + words);
		ports[0] = source;
		ports[1] = destination;
		ports[3] = sum ? sum : 0xffff;
	}
	if (template->entropy) {
		__u16 *entropy = data + (template->entropy & 0xff);

		if ((void *)(entropy + 1) > end)
			return XDP_ABORTED;
		*entropy = be16(0xc000 | (progress->flow & 0x3fff));
	}
	if (++progress->flow >= settings->flows)
		progress->flow = 0;
	if (++progress->place >= settings->pattern_length)
		progress->place = 0;
	progress->packets++;
	progress->bytes += template->size;
	return bpf_redirect(settings->ifindex, 0);
}
