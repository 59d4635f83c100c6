/* What both XDP programs need of BPF: section names, map keywords, two helpers. No libbpf. */
#ifndef VSWITCH_COMMON_H
#define VSWITCH_COMMON_H

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

/* Helper numbers are kernel ABI: linux/bpf.h, __BPF_FUNC_MAPPER. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)51;

#define MAX_QUEUES 64

/* One AF_XDP socket a receive queue; an empty slot means that no worker owns the queue. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} SOCKETS SEC(".maps");

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#endif
