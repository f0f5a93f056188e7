#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/types.h>

#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_ip.h>
#include <rte_lcore.h>
#include <rte_log.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_prefetch.h>
#include <rte_tcp.h>
#include <rte_udp.h>

#include "shim.h"

static inline void view(const struct rte_mbuf *m, struct ferry_segment *v)
{
	v->data = rte_pktmbuf_mtod(m, const uint8_t *);
	v->next = m->next;
	v->ol_flags = m->ol_flags;
	v->pkt_len = m->pkt_len;
	v->data_len = m->data_len;
	v->nb_segs = m->nb_segs;
	v->tso_segsz = m->tso_segsz;
}

uint16_t ferry_eth_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, struct ferry_segment *views,
			    uint16_t n)
{
	uint16_t got = rte_eth_rx_burst(port, queue, pkts, n);

	for (uint16_t i = 0; i < got; i++) {
		if (i + 4 < got)
			rte_prefetch0(pkts[i + 4]);
		view(pkts[i], &views[i]);
	}
	return got;
}

uint16_t ferry_eth_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, uint16_t n)
{
	return rte_eth_tx_burst(port, queue, pkts, n);
}

uint16_t ferry_eth_tx_prepare(uint16_t port, uint16_t queue, struct rte_mbuf **pkts, uint16_t n)
{
	return rte_eth_tx_prepare(port, queue, pkts, n);
}

int ferry_eth_rx_queue_count(uint16_t port, uint16_t queue)
{
	return rte_eth_rx_queue_count(port, queue);
}

int ferry_errno(void)
{
	return rte_errno;
}

int ferry_thread_has_lcore(void)
{
	return rte_lcore_id() != LCORE_ID_ANY;
}

int ferry_pktmbuf_alloc_bulk(struct rte_mempool *pool, struct rte_mbuf **pkts, uint16_t n)
{
	return rte_pktmbuf_alloc_bulk(pool, pkts, n);
}

void ferry_pktmbuf_free_bulk(struct rte_mbuf **pkts, uint16_t n)
{
	rte_pktmbuf_free_bulk(pkts, n);
}

void ferry_mbuf_view(const struct rte_mbuf *m, struct ferry_segment *v)
{
	view(m, v);
}

uint8_t *ferry_mbuf_data(struct rte_mbuf *m)
{
	return rte_pktmbuf_mtod(m, uint8_t *);
}

uint16_t ferry_mbuf_tailroom(const struct rte_mbuf *m)
{
	return rte_pktmbuf_tailroom(m);
}

void ferry_mbuf_set_len(struct rte_mbuf *m, uint16_t data_len)
{
	m->data_len = data_len;
	m->pkt_len = data_len;
}

void ferry_mbuf_chain(struct rte_mbuf *head, struct rte_mbuf *tail, struct rte_mbuf *seg, uint16_t data_len)
{
	seg->data_len = data_len;
	seg->pkt_len = data_len;
	tail->next = seg;
	head->nb_segs++;
	head->pkt_len += data_len;
}

void ferry_mbuf_request(struct rte_mbuf *m, const struct ferry_tx_offload *off)
{
	uint64_t l4 = off->ol_flags & RTE_MBUF_F_TX_L4_MASK;
	uint8_t *l3_hdr = rte_pktmbuf_mtod_offset(m, uint8_t *, off->l2_len);
	uint8_t *l4_hdr = l3_hdr + off->l3_len;
	rte_be16_t sum;

	m->ol_flags |= off->ol_flags;
	m->l2_len = off->l2_len;
	m->l3_len = off->l3_len;
	m->l4_len = off->l4_len;
	m->tso_segsz = off->tso_segsz;

	if (off->ol_flags & RTE_MBUF_F_TX_IP_CKSUM)
		((struct rte_ipv4_hdr *)l3_hdr)->hdr_checksum = 0;
	if (l4 != RTE_MBUF_F_TX_TCP_CKSUM && l4 != RTE_MBUF_F_TX_UDP_CKSUM)
		return;
	if (off->ol_flags & RTE_MBUF_F_TX_IPV4)
		sum = rte_ipv4_phdr_cksum((const struct rte_ipv4_hdr *)l3_hdr, off->ol_flags);
	else
		sum = rte_ipv6_phdr_cksum((const struct rte_ipv6_hdr *)l3_hdr, off->ol_flags);
	if (l4 == RTE_MBUF_F_TX_TCP_CKSUM)
		((struct rte_tcp_hdr *)l4_hdr)->cksum = sum;
	else
		((struct rte_udp_hdr *)l4_hdr)->dgram_cksum = sum;
}

uint64_t ferry_mbuf_ol_flags(const struct rte_mbuf *m)
{
	return m->ol_flags;
}

static ferry_log_sink log_sink;

static ssize_t log_write(void *cookie, const char *buf, size_t size)
{
	(void)cookie;
	if (log_sink != NULL)
		log_sink((uint32_t)rte_log_cur_msg_loglevel(), buf, size);
	return (ssize_t)size;
}

int ferry_log_open(ferry_log_sink sink)
{
	cookie_io_functions_t io = { .write = log_write };
	FILE *f;

	log_sink = sink;
	f = fopencookie(NULL, "w", io);
	if (f == NULL)
		return -errno;
	/* rte_vlog flushes after each message: full buffering gives one write per message. */
	setvbuf(f, NULL, _IOFBF, 4096);
	if (rte_openlog_stream(f) != 0) {
		fclose(f);
		return -EINVAL;
	}
	return 0;
}
