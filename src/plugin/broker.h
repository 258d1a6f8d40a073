/* SPDX-License-Identifier: Apache-2.0
 *
 * The broker's plugin interface, version 5, as 2.0 and 2.1 have it. A plugin that is built against either runs in both:
 * 2.1 has moved its headers and given one reserved member of the TICK event a meaning.
 */
#ifndef BEDNET_BROKER_H
#define BEDNET_BROKER_H

#if __has_include(<mosquitto/broker_plugin.h>)
#	include <mosquitto/broker.h>
#	include <mosquitto/broker_plugin.h>
#	define TICK_NEXT_MS(event) ((event)->next_ms)
#else
#	include <mosquitto.h>
#	include <mosquitto_broker.h>
#	include <mosquitto_plugin.h>
/* 2.0 does not look at what it calls next_ns, and calls each time round its loop. */
#	define TICK_NEXT_MS(event) ((event)->next_ns)
/* Of 2.1; 2.0 answers that it does not know these events. */
#	define MOSQ_EVT_CONNECT 11
#	define MOSQ_EVT_CLIENT_OFFLINE 28
struct mosquitto_evt_client_offline {
	void *future;
	struct mosquitto *client;
	int reason;
	void *future2[4];
};
struct mosquitto_evt_connect {
	void *future;
	struct mosquitto *client;
	void *future2[4];
};
#endif

#endif
