/* SPDX-License-Identifier: Apache-2.0
 *
 * May it? The twin of decide_by() in src/bednet/policy.py; tests/plugin/test_judges.py holds the two against each other.
 *
 * A deny wins over any allow; what no rule allows is denied. A rule with windows or networks holds at such times and from
 * such addresses only. Where the time or the address is not known, such an allow does not count, and such a deny does;
 * where one is to be generous, it is the other way round.
 */
#include "bednet.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#define PLACEHOLDER 0xFF /* never a byte of UTF-8 */
#define GRANTS_MAX (16u << 20) /* bytes of one device's grants; a profile that needs more is not believed */
#define TOPIC_MAX 65535 /* bytes */
#define DAY 86400 /* seconds */


/* The length of a rule's topic with its placeholders filled in, and the text itself into `out` unless that is NULL. */
static bool fill_in(struct slice topic, const char *id, size_t id_len, const struct grant_source *source, char *out,
		size_t *len)
{
	size_t i;

	*len = 0;
	for(i = 0; i < topic.len; i++){
		struct slice part = {topic.at + i, 1};

		if(topic.at[i] == PLACEHOLDER){
			if(++i == topic.len || topic.at[i] > source->value_count){
				return false;
			}
			part = topic.at[i] ? source->values[topic.at[i] - 1] : (struct slice){(const uint8_t *)id, id_len};
		}
		if(out){
			memcpy(out + *len, part.at, part.len);
		}
		*len += part.len;
		if(*len > TOPIC_MAX){
			return false;
		}
	}
	return true;
}


/* What the grants of all these profiles take. */
struct room {
	size_t grants, windows, networks, text;
};


/* Once over a profile, to see that it parses and how much room it takes. */
static bool measure(const struct grant_source *source, const char *id, size_t id_len, struct room *room)
{
	struct profile_cursor cursor;
	struct profile_rule rule;
	size_t len;
	int rc;

	if(!record__profile(source->profile, &cursor)){
		return false;
	}
	while((rc = record__next_rule(&cursor, &rule)) > 0){
		if(!fill_in(rule.topic, id, id_len, source, NULL, &len)){
			return false;
		}
		room->grants++;
		room->windows += rule.window_count;
		room->networks += rule.network_count;
		room->text += len + rule.id.len;
		if(room->text > GRANTS_MAX){
			return false;
		}
	}
	return rc == 0;
}


enum reason decide__grants(const struct grant_source *sources, size_t source_count, const char *id, size_t id_len,
		struct grants **out)
{
	struct profile_cursor cursor;
	struct profile_rule rule;
	struct room room = {0};
	struct grants *grants;
	struct grant *grant;
	struct window *windows;
	struct network *networks;
	char *text;
	size_t size, i;

	*out = NULL;
	for(i = 0; i < source_count; i++){
		if(!measure(&sources[i], id, id_len, &room)){
			return REASON_STORE;
		}
	}
	size = sizeof(*grants) + room.grants * sizeof(struct grant) + room.windows * sizeof(struct window)
			+ room.networks * sizeof(struct network) + room.text;
	if(size > GRANTS_MAX){
		return REASON_STORE;
	}
	grants = malloc(size);
	if(grants == NULL){
		return REASON_INTERNAL;
	}
	grants->count = room.grants;
	grants->size = size;
	grant = grants->list;
	windows = (struct window *)(void *)&grants->list[room.grants];
	networks = (struct network *)(void *)(windows + room.windows);
	text = (char *)(networks + room.networks);

	for(i = 0; i < source_count; i++){
		if(!record__profile(sources[i].profile, &cursor)){
			goto unsound;
		}
		for(; record__next_rule(&cursor, &rule) > 0; grant++){
			unsigned int j;

			grant->effect = rule.effect;
			grant->access = rule.access;
			grant->window_count = rule.window_count;
			grant->windows = windows;
			for(j = 0; j < rule.window_count; j++){
				if(!record__window(&rule.windows, windows++)){
					goto unsound;
				}
			}
			grant->network_count = rule.network_count;
			grant->networks = networks;
			for(j = 0; j < rule.network_count; j++){
				if(!record__network(&rule.networks, networks++)){
					goto unsound;
				}
			}
			grant->id = text;
			grant->id_len = (uint8_t)rule.id.len;
			memcpy(text, rule.id.at, rule.id.len);
			text += rule.id.len;
			grant->filter = text;
			if(!fill_in(rule.topic, id, id_len, &sources[i], text, &grant->filter_len)
					|| !topics__filter_ok(grant->filter, grant->filter_len)){
				goto unsound;
			}
			text += grant->filter_len;
		}
	}
	*out = grants;
	return REASON_NONE;

unsound:
	free(grants);
	return REASON_STORE;
}


bool decide__address(const char *text, struct moment *out)
{
	static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

	out->family = 0;
	memset(out->address, 0, sizeof(out->address));
	if(text == NULL){
		return false;
	}
	if(inet_pton(AF_INET, text, out->address) == 1){
		out->family = 4;
	}else if(inet_pton(AF_INET6, text, out->address) == 1){
		out->family = 6;
		if(memcmp(out->address, mapped, sizeof(mapped)) == 0){
			memmove(out->address, out->address + sizeof(mapped), 4);
			memset(out->address + 4, 0, sizeof(out->address) - 4);
			out->family = 4;
		}
	}
	return out->family != 0;
}


static bool within(const struct network *network, const struct moment *moment)
{
	size_t whole = network->prefix / 8;
	unsigned int rest = network->prefix % 8;

	if(network->family != moment->family || memcmp(network->address, moment->address, whole) != 0){
		return false;
	}
	return rest == 0 || (network->address[whole] ^ moment->address[whole]) >> (8 - rest) == 0;
}


/* On the wall clock of the zone: start inclusive, end exclusive. */
static bool open_at(const struct window *window, int64_t local)
{
	int64_t days = local / DAY, second = local % DAY;
	unsigned int today, yesterday;

	if(second < 0){
		second += DAY;
		days--;
	}
	today = (unsigned int)(((days + 3) % 7 + 7) % 7); /* 1970-01-01 was a Thursday */
	yesterday = (today + 6) % 7;
	if(window->to > window->from){
		return (window->days >> today & 1) && second >= window->from && second < window->to;
	}
	return ((window->days >> today & 1) && second >= window->from)
			|| ((window->days >> yesterday & 1) && second < window->to);
}


static bool is_always_open(const struct window *window)
{
	return window->days == 0x7F && (window->from == window->to || (window->from == 0 && window->to == DAY));
}


/* Whether a rule holds at the moment. *sound becomes false when that cannot be told for want of a time zone. */
static bool holds(const struct grant *grant, const struct moment *moment, zone_lookup zones, void *context, bool *sound)
{
	const bool unknown = (grant->effect == EFFECT_DENY) != moment->generous;
	unsigned int i;

	if(grant->network_count){
		bool inside = moment->family == 0 && unknown;

		for(i = 0; i < grant->network_count && !inside && moment->family; i++){
			inside = within(&grant->networks[i], moment);
		}
		if(!inside){
			return false;
		}
	}
	if(grant->window_count){
		bool inside = !moment->has_time && unknown;

		for(i = 0; i < grant->window_count && !inside; i++){
			int32_t offset;

			if(!moment->has_time){
				inside = is_always_open(&grant->windows[i]);
				continue;
			}
			if(!zones(context, grant->windows[i].zone, moment->now, &offset)){
				*sound = false;
				return false;
			}
			inside = open_at(&grant->windows[i], moment->now + offset);
		}
		return inside;
	}
	return true;
}


/* A topic name is matched or not; there is no part of it. */
static struct decision decide_name(const struct grants *grants, uint8_t access, const char *topic, size_t len,
		const struct moment *moment, zone_lookup zones, void *context)
{
	struct decision decision = {REASON_NOT_ALLOWED, NULL};
	bool sound = true;
	size_t i;

	for(i = 0; i < grants->count; i++){
		const struct grant *grant = &grants->list[i];

		/* Once something allows it, only a deny is of interest. */
		if(grant->access != access || (grant->effect == EFFECT_ALLOW && decision.reason == REASON_NONE)
				|| !topics__matches(grant->filter, grant->filter_len, topic, len)
				|| !holds(grant, moment, zones, context, &sound)){
			continue;
		}
		decision.grant = grant;
		decision.reason = REASON_NONE;
		if(grant->effect == EFFECT_DENY){
			decision.reason = REASON_DENIED;
			break;
		}
	}
	return sound ? decision : (struct decision){REASON_STORE, NULL};
}


/* Whether some of what an allow has in common with the topic is not covered by one deny. */
static bool leaves_something(const struct grants *grants, const struct grant *allow, const char *topic, size_t len,
		const struct moment *moment, zone_lookup zones, void *context)
{
	char *common = malloc(allow->filter_len + len + 2);
	bool sound = true, covered = false;
	size_t common_len, i;

	if(common == NULL){
		return true; /* it is refused in any case, with a reason that is less exact */
	}
	common_len = topics__intersection(allow->filter, allow->filter_len, topic, len, common);
	for(i = 0; i < grants->count && !covered; i++){
		const struct grant *deny = &grants->list[i];

		covered = deny->effect == EFFECT_DENY && deny->access == ACCESS_SUBSCRIBE
				&& topics__covers(deny->filter, deny->filter_len, common, common_len)
				&& holds(deny, moment, zones, context, &sound);
	}
	free(common);
	return !covered;
}


static struct decision decide_filter(const struct grants *grants, const char *topic, size_t len,
		const struct moment *moment, zone_lookup zones, void *context)
{
	const struct grant *deny = NULL, *allow = NULL, *touching = NULL;
	bool sound = true;
	size_t i;

	for(i = 0; i < grants->count; i++){
		const struct grant *grant = &grants->list[i];

		if(grant->access != ACCESS_SUBSCRIBE
				|| !topics__intersection(grant->filter, grant->filter_len, topic, len, NULL)
				|| !holds(grant, moment, zones, context, &sound)){
			continue;
		}
		if(grant->effect == EFFECT_DENY){
			if(sound && topics__covers(grant->filter, grant->filter_len, topic, len)){
				return (struct decision){REASON_DENIED, grant};
			}
			deny = deny ? deny : grant;
		}else{
			touching = touching ? touching : grant;
			if(!allow && topics__covers(grant->filter, grant->filter_len, topic, len)){
				allow = grant;
			}
		}
	}
	if(!sound){
		return (struct decision){REASON_STORE, NULL};
	}
	if(!touching){
		return (struct decision){REASON_NOT_ALLOWED, NULL};
	}
	if(!deny){
		return allow ? (struct decision){REASON_NONE, allow} : (struct decision){REASON_PARTLY, touching};
	}
	for(i = 0; i < grants->count; i++){
		const struct grant *grant = &grants->list[i];

		if(grant->effect == EFFECT_ALLOW && grant->access == ACCESS_SUBSCRIBE
				&& topics__intersection(grant->filter, grant->filter_len, topic, len, NULL)
				&& holds(grant, moment, zones, context, &sound)
				&& leaves_something(grants, grant, topic, len, moment, zones, context)){
			return (struct decision){REASON_PARTLY, deny};
		}
	}
	return (struct decision){REASON_DENIED, deny};
}


struct decision decide__by(const struct grants *grants, enum access access, const char *topic, size_t len,
		const struct moment *moment, zone_lookup zones, void *context)
{
	if(access == ACCESS_SUBSCRIBE){
		if(!topics__unshare(&topic, &len) || !topics__filter_ok(topic, len)){
			return (struct decision){REASON_NOT_ALLOWED, NULL};
		}
		return decide_filter(grants, topic, len, moment, zones, context);
	}
	if(!topics__name_ok(topic, len)){
		return (struct decision){REASON_NOT_ALLOWED, NULL};
	}
	return decide_name(grants, access == ACCESS_DELIVER ? ACCESS_SUBSCRIBE : ACCESS_PUBLISH, topic, len, moment,
			zones, context);
}
