/*
 * DPDK's data path consists of inline functions, and rte_mbuf has unions and bit-fields that do not
 * translate. This shim gives them a linkable form at burst granularity, so that the price of a call is
 * paid per burst rather than per field.
 */
#ifndef FERRY_SHIM_H
#define FERRY_SHIM_H

#include <stddef.h>
#include <stdint.h>

struct rte_mbuf;
struct rte_mempool;

/* One segment of a received packet; for the first segment also the packet's facts. */
struct ferry_segment {
	const uint8_t *data;
	struct rte_mbuf *next;
	uint64_t ol_flags;
	uint32_t pkt_len;
	uint16_t data_len;
	uint16_t nb_segs;
	uint16_t tso_segsz;
};

/* What a device is asked to do to a packet, and where its headers lie. */
struct ferry_tx_offload {
	uint64_t ol_flags;
	uint16_t l2_len;
	uint16_t l3_len;
	uint16_t l4_len;
	uint16_t tso_segsz;
};

typedef void (*ferry_log_sink)(uint32_t level, const char *text, size_t len);

/* rte_eth_rx_burst, then views[i] = first segment of pkts[i]. */
uint16_t ferry_eth_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, struct ferry_segment *views,
			    uint16_t n);
uint16_t ferry_eth_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, uint16_t n);
uint16_t ferry_eth_tx_prepare(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, uint16_t n);
/* Packets waiting in the receive queue, or a negative errno where the driver cannot tell. */
int ferry_eth_rx_queue_count(uint16_t port, uint16_t queue);

/* The calling thread's rte_errno. */
int ferry_errno(void);
/* Whether the calling thread has an lcore id, hence mempool caches of its own. */
int ferry_thread_has_lcore(void);

/* 0, or a negative errno when not all n are to be had (then none is taken). */
int ferry_pktmbuf_alloc_bulk(struct rte_mempool *pool, struct rte_mbuf **pkts, uint16_t n);
void ferry_pktmbuf_free_bulk(struct rte_mbuf **pkts, uint16_t n);
/* Describes segment m of a chain. */
void ferry_mbuf_view(const struct rte_mbuf *m, struct ferry_segment *view);
/* Writable start of a segment's data, and the room behind the data it has. */
uint8_t *ferry_mbuf_data(struct rte_mbuf *m);
uint16_t ferry_mbuf_tailroom(const struct rte_mbuf *m);
/* Makes seg, with data_len bytes, the last segment of head's chain; tail is the present last one. */
void ferry_mbuf_chain(struct rte_mbuf *head, struct rte_mbuf *tail, struct rte_mbuf *seg, uint16_t data_len);
/* Sets the length of a packet of one segment. */
void ferry_mbuf_set_len(struct rte_mbuf *m, uint16_t data_len);
/*
 * Requests offloads and brings the headers into the form DPDK asks for: IPv4 header checksum 0 where it is
 * requested, L4 checksum = sum of the pseudo-header (without the length under segmentation). The headers named by off
 * must lie in the first segment.
 */
void ferry_mbuf_request(struct rte_mbuf *m, const struct ferry_tx_offload *off);
uint64_t ferry_mbuf_ol_flags(const struct rte_mbuf *m);

/* Sends DPDK's log, line by line, to sink. Returns 0 or a negative errno. */
int ferry_log_open(ferry_log_sink sink);

#endif
