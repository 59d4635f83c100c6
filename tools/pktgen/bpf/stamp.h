/* A time stamp in a packet, right behind its UDP header. */
#ifndef PKTGEN_STAMP_H
#define PKTGEN_STAMP_H

#include <linux/types.h>

/* "pktgen", as it lies in memory, and two bytes more. */
#define STAMP 0x0102006e65676b70ULL

struct stamp {
	__u64 magic;
	/* CLOCK_MONOTONIC */
	__u64 sent_ns;
} __attribute__((packed, aligned(2)));

#endif
