/* SPDX-License-Identifier: Apache-2.0
 *
 * Topic names and topic filters (MQTT 5, 4.7). The twin of src/bednet/topics.py; tests/plugin/test_judges.py holds
 * the two against each other.
 */
#include "bednet.h"

#include <string.h>

#define TOPIC_MAX 65535 /* bytes: the longest string that MQTT carries */

/* The levels of a filter, one after the other. Every topic has a first level, so '#' says the same as '+/#'; one
 * spelling spares a special case wherever two filters are compared. */
struct levels {
	const char *at, *end; /* at == NULL: none left */
	bool hash; /* '#' is still to come */
};

struct level {
	const char *at; /* NULL: there is none */
	size_t len;
};


static struct levels levels_of(const char *filter, size_t len)
{
	struct levels levels = {filter, filter + len, false};

	if(len == 1 && filter[0] == '#'){
		levels.hash = true;
	}
	return levels;
}


static struct level next_level(struct levels *levels)
{
	struct level level = {levels->at, 0};
	const char *slash;

	if(levels->hash){
		if(levels->at == levels->end){
			level.at = "#";
			level.len = 1;
			levels->at = NULL;
			levels->hash = false;
		}else{
			level.at = "+";
			level.len = 1;
			levels->at = levels->end;
		}
		return level;
	}
	if(levels->at == NULL){
		return level;
	}
	slash = levels->at == levels->end ? NULL : memchr(levels->at, '/', (size_t)(levels->end - levels->at));
	if(slash){
		level.len = (size_t)(slash - levels->at);
		levels->at = slash + 1;
	}else{
		level.len = (size_t)(levels->end - levels->at);
		levels->at = NULL;
	}
	return level;
}


static bool is(struct level level, char wildcard)
{
	return level.at && level.len == 1 && level.at[0] == wildcard;
}


static bool same(struct level one, struct level other)
{
	return one.len == other.len && memcmp(one.at, other.at, one.len) == 0;
}


static bool dollar(struct level level)
{
	return level.len > 0 && level.at[0] == '$';
}


bool topics__name_ok(const char *name, size_t len)
{
	return len > 0 && len <= TOPIC_MAX && !memchr(name, '+', len) && !memchr(name, '#', len) && !memchr(name, 0, len);
}


bool topics__filter_ok(const char *filter, size_t len)
{
	struct levels levels;
	struct level level;

	if(len == 0 || len > TOPIC_MAX || memchr(filter, 0, len)){
		return false;
	}
	if(len == 1 && filter[0] == '#'){
		return true;
	}
	levels = levels_of(filter, len);
	for(level = next_level(&levels); level.at; level = next_level(&levels)){
		if(level.len > 0 && memchr(level.at, '+', level.len) && level.len != 1){
			return false;
		}
		if(level.len > 0 && memchr(level.at, '#', level.len) && (level.len != 1 || levels.at)){
			return false;
		}
	}
	return true;
}


bool topics__unshare(const char **filter, size_t *len)
{
	const char prefix[] = "$share";
	const size_t prefix_len = sizeof(prefix) - 1;
	const char *group, *inner, *end = *filter + *len;

	if(*len < prefix_len || memcmp(*filter, prefix, prefix_len) != 0
			|| (*len > prefix_len && (*filter)[prefix_len] != '/')){
		return true;
	}
	if(*len < prefix_len + 2){
		return false;
	}
	group = *filter + prefix_len + 1;
	inner = memchr(group, '/', (size_t)(end - group));
	if(inner == NULL || inner == group || inner + 1 == end
			|| memchr(group, '+', (size_t)(inner - group)) || memchr(group, '#', (size_t)(inner - group))){
		return false;
	}
	*filter = inner + 1;
	*len = (size_t)(end - *filter);
	return true;
}


bool topics__covers(const char *ours, size_t ours_len, const char *theirs, size_t theirs_len)
{
	struct levels our_levels = levels_of(ours, ours_len), their_levels = levels_of(theirs, theirs_len);
	struct level our = next_level(&our_levels), their = next_level(&their_levels);

	if(is(our, '+') && dollar(their)){
		return false;
	}
	while(our.at){
		if(is(our, '#')){
			return true; /* also the parent: a/# covers a */
		}
		if(their.at == NULL || is(their, '#')){
			return false;
		}
		if(!is(our, '+') && !same(our, their)){
			return false;
		}
		our = next_level(&our_levels);
		their = next_level(&their_levels);
	}
	return their.at == NULL;
}


/* What topics__covers says of a topic name, in one pass: this is asked for each rule at each message. */
bool topics__matches(const char *filter, size_t filter_len, const char *name, size_t name_len)
{
	const char *filter_end = filter + filter_len, *name_end = name + name_len;

	if(filter_len > 0 && name_len > 0 && (*filter == '+' || *filter == '#') && *name == '$'){
		return false;
	}
	/* Both are at the beginning of a level; in a valid filter a wildcard is all of its level. */
	while(true){
		if(filter < filter_end && *filter == '#'){
			return true;
		}
		if(filter < filter_end && *filter == '+'){
			filter++;
			while(name < name_end && *name != '/'){
				name++;
			}
		}else{
			while(filter < filter_end && name < name_end && *filter == *name && *filter != '/'){
				filter++;
				name++;
			}
		}
		if(filter == filter_end){
			return name == name_end;
		}
		if(*filter != '/'){
			return false;
		}
		if(name == name_end){
			return filter_end - filter == 2 && filter[1] == '#'; /* a/# matches a */
		}
		if(*name != '/'){
			return false;
		}
		filter++;
		name++;
	}
}


static size_t put(char *out, size_t used, struct level level)
{
	if(out){
		if(used){
			out[used - 1] = '/';
		}
		if(level.len > 0){
			memcpy(out + used, level.at, level.len);
		}
	}
	return used + level.len + 1; /* with the '/' that may come behind it */
}


size_t topics__intersection(const char *one, size_t one_len, const char *other, size_t other_len, char *out)
{
	struct levels lefts = levels_of(one, one_len), rights = levels_of(other, other_len);
	struct level left = next_level(&lefts), right = next_level(&rights);
	size_t used = 0;

	if((is(left, '+') || is(right, '+')) && (dollar(left) || dollar(right))){
		return 0;
	}
	while(left.at || right.at){
		if(is(left, '#') || is(right, '#')){
			struct levels *rest = is(left, '#') ? &rights : &lefts;
			struct level level = is(left, '#') ? right : left;

			for(; level.at; level = next_level(rest)){
				used = put(out, used, level);
			}
			break;
		}
		if(left.at == NULL || right.at == NULL){
			return 0;
		}
		if(is(left, '+')){
			used = put(out, used, right);
		}else if(is(right, '+') || same(left, right)){
			used = put(out, used, left);
		}else{
			return 0;
		}
		left = next_level(&lefts);
		right = next_level(&rights);
	}
	if(out && used == 4 && memcmp(out, "+/#", 3) == 0){
		out[0] = '#';
		return 1;
	}
	return used - 1; /* 0 for '/#' and '+', which both match one empty level: no topic name is empty */
}
