/* Where a link's packets go: one AF_XDP socket a receive queue; an empty slot means that no worker owns the queue. */
#ifndef VSWITCH_SOCKETS_H
#define VSWITCH_SOCKETS_H

#include "bpf.h"

#define MAX_QUEUES 64

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} SOCKETS SEC(".maps");

#endif
