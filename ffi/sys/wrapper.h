/* What bindgen sees: DPDK's control functions as they are, its inline data path through shim.h. */
#ifndef FERRY_WRAPPER_H
#define FERRY_WRAPPER_H

#include <rte_bus.h>
#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_log.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_version.h>

#include "shim.h"

/* Macros that bindgen cannot evaluate, as typed constants. */
static const uint64_t FERRY_RX_L4_CKSUM_MASK = RTE_MBUF_F_RX_L4_CKSUM_MASK;
static const uint64_t FERRY_RX_L4_CKSUM_GOOD = RTE_MBUF_F_RX_L4_CKSUM_GOOD;
static const uint64_t FERRY_RX_L4_CKSUM_NONE = RTE_MBUF_F_RX_L4_CKSUM_NONE;
static const uint64_t FERRY_RX_IP_CKSUM_MASK = RTE_MBUF_F_RX_IP_CKSUM_MASK;
static const uint64_t FERRY_RX_IP_CKSUM_BAD = RTE_MBUF_F_RX_IP_CKSUM_BAD;
static const uint64_t FERRY_RX_VLAN_STRIPPED = RTE_MBUF_F_RX_VLAN_STRIPPED;
static const uint64_t FERRY_RX_LRO = RTE_MBUF_F_RX_LRO;
static const uint64_t FERRY_TX_TCP_SEG = RTE_MBUF_F_TX_TCP_SEG;
static const uint64_t FERRY_TX_TCP_CKSUM = RTE_MBUF_F_TX_TCP_CKSUM;
static const uint64_t FERRY_TX_UDP_CKSUM = RTE_MBUF_F_TX_UDP_CKSUM;
static const uint64_t FERRY_TX_IP_CKSUM = RTE_MBUF_F_TX_IP_CKSUM;
static const uint64_t FERRY_TX_IPV4 = RTE_MBUF_F_TX_IPV4;
static const uint64_t FERRY_TX_IPV6 = RTE_MBUF_F_TX_IPV6;

static const uint64_t FERRY_RX_OFFLOAD_IPV4_CKSUM = RTE_ETH_RX_OFFLOAD_IPV4_CKSUM;
static const uint64_t FERRY_RX_OFFLOAD_UDP_CKSUM = RTE_ETH_RX_OFFLOAD_UDP_CKSUM;
static const uint64_t FERRY_RX_OFFLOAD_TCP_CKSUM = RTE_ETH_RX_OFFLOAD_TCP_CKSUM;
static const uint64_t FERRY_RX_OFFLOAD_SCATTER = RTE_ETH_RX_OFFLOAD_SCATTER;
static const uint64_t FERRY_RX_OFFLOAD_VLAN_STRIP = RTE_ETH_RX_OFFLOAD_VLAN_STRIP;
static const uint64_t FERRY_TX_OFFLOAD_IPV4_CKSUM = RTE_ETH_TX_OFFLOAD_IPV4_CKSUM;
static const uint64_t FERRY_TX_OFFLOAD_UDP_CKSUM = RTE_ETH_TX_OFFLOAD_UDP_CKSUM;
static const uint64_t FERRY_TX_OFFLOAD_TCP_CKSUM = RTE_ETH_TX_OFFLOAD_TCP_CKSUM;
static const uint64_t FERRY_TX_OFFLOAD_TCP_TSO = RTE_ETH_TX_OFFLOAD_TCP_TSO;
static const uint64_t FERRY_TX_OFFLOAD_MULTI_SEGS = RTE_ETH_TX_OFFLOAD_MULTI_SEGS;

static const uint64_t FERRY_RSS_IP = RTE_ETH_RSS_IP;
static const uint64_t FERRY_RSS_TCP = RTE_ETH_RSS_TCP;
static const uint64_t FERRY_RSS_UDP = RTE_ETH_RSS_UDP;
static const uint64_t FERRY_RSS_SCTP = RTE_ETH_RSS_SCTP;

static const uint32_t FERRY_SPEED_UNKNOWN = RTE_ETH_SPEED_NUM_UNKNOWN;
static const int32_t FERRY_SOCKET_ID_ANY = SOCKET_ID_ANY;

#endif
