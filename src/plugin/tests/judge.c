/* SPDX-License-Identifier: Apache-2.0
 *
 * The plugin's decision without a broker, for the tests: a shared library that tests/plugin/test_judges.py asks by way of
 * ctypes, with the time and the address as questions of the test. Nothing of it is in the plugin.
 */
#include "../bednet.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT struct store *judge_open(const char *path, char *why, size_t why_len);
EXPORT void judge_close(struct store *store);
EXPORT int judge_decide(struct store *store, const char *id, int access, const char *topic, size_t len, int has_time,
		int64_t now, const char *address, char rule[UINT8_MAX + 1]);
EXPORT size_t judge_intersection(const char *one, size_t one_len, const char *other, size_t other_len, char *out);
EXPORT int judge_covers(const char *ours, size_t ours_len, const char *theirs, size_t theirs_len);
EXPORT int judge_filter_ok(const char *filter, size_t len);
EXPORT size_t judge_escape(const char *text, size_t len, char *out, size_t room);


static void ignore_device(void *context, const char *id, size_t len)
{
	(void)context;
	(void)id;
	(void)len;
}


static void ignore_all(void *context)
{
	(void)context;
}


struct store *judge_open(const char *path, char *why, size_t why_len)
{
	struct store *store = malloc(sizeof(*store));

	if(store && !store__open(store, path, why, why_len)){
		free(store);
		store = NULL;
	}
	return store;
}


void judge_close(struct store *store)
{
	store__close(store);
	free(store);
}


/* An enum reason; the rule's id in `rule`, empty when there is none. */
int judge_decide(struct store *store, const char *id, int access, const char *topic, size_t len, int has_time,
		int64_t now, const char *address, char rule[UINT8_MAX + 1])
{
	const struct change_sink sink = {ignore_device, ignore_all, ignore_all, NULL};
	struct device device = {.until = BEDNET_NEVER};
	struct moment moment = {.has_time = has_time != 0, .now = now};
	struct decision decision = {REASON_NONE, NULL};
	size_t id_len = strlen(id);

	rule[0] = '\0';
	if(id_len > BEDNET_ID_MAX){
		return REASON_UNKNOWN_DEVICE;
	}
	memcpy(device.id, id, id_len + 1);
	decide__address(address, &moment);
	if(store__moved(store)){
		store__refresh(store, &sink);
	}
	device__read(store, &device);
	decision.reason = device.state;
	if(decision.reason == REASON_NONE && moment.has_time && now >= device.until){
		decision.reason = REASON_UNTIL;
	}
	if(decision.reason == REASON_NONE){
		decision = decide__by(device.grants, (enum access)access, topic, len, &moment, store__zone, store);
	}
	if(decision.grant){
		memcpy(rule, decision.grant->id, decision.grant->id_len);
		rule[decision.grant->id_len] = '\0';
	}
	device__clear(&device);
	return (int)decision.reason;
}


size_t judge_intersection(const char *one, size_t one_len, const char *other, size_t other_len, char *out)
{
	return topics__intersection(one, one_len, other, other_len, out);
}


int judge_covers(const char *ours, size_t ours_len, const char *theirs, size_t theirs_len)
{
	return topics__covers(ours, ours_len, theirs, theirs_len);
}


int judge_filter_ok(const char *filter, size_t len)
{
	return topics__filter_ok(filter, len);
}


size_t judge_escape(const char *text, size_t len, char *out, size_t room)
{
	return audit__escape(text, len, out, room);
}
