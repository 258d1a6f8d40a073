/* SPDX-License-Identifier: Apache-2.0
 *
 * Failed logins by password and by token. One bucket for each identity from an address, so that a stranger elsewhere locks
 * nobody out, and one for each address, which fails more often before it is stopped, as many devices may share one. A
 * bucket drains evenly: once blocked, an identity may try again every 60/limit seconds.
 *
 * Who has shown a certificate has proved who it is, and has a bucket that nobody else can fill, wherever it comes from.
 *
 * An IPv6 address counts whole: all hosts of a plant's network share its prefix, and one of them must not stop the others.
 * Who has many addresses may guess more often at 256 bits.
 *
 * The table has a fixed size. Where it is full, the entry with least to say gives way: an attacker with very many
 * addresses makes us forget, but can neither grow the table nor lock anybody out by a collision.
 */
#include "bednet.h"

#include <string.h>

#include <openssl/evp.h>
#include <openssl/rand.h>

#define MINUTE 60 /* seconds */
#define PROVED 1 /* no family of addresses */

struct place {
	uint64_t tag;
	size_t set;
};


bool throttle__init(struct throttle *throttle, uint32_t limit)
{
	memset(throttle, 0, sizeof(*throttle));
	throttle->limit = limit;
	return RAND_bytes(throttle->key, sizeof(throttle->key)) == 1;
}


/* Where to look; without `id` for the address as a whole, without `from` for a device that has proved who it is. False
 * when it cannot be told. */
static bool find_place(const struct throttle *throttle, const struct moment *from, const char *id, struct place *out)
{
	uint8_t in[sizeof(throttle->key) + 1 + sizeof(from->address) + BEDNET_ID_MAX + 2] = {0}, digest[HASH_LEN];
	size_t len = sizeof(throttle->key);

	memcpy(in, throttle->key, len);
	in[len++] = from ? from->family : PROVED;
	if(from){
		memcpy(in + len, from->address, sizeof(from->address));
	}
	len += sizeof(from->address);
	if(id){
		size_t id_len = strnlen(id, BEDNET_ID_MAX + 1);

		in[len++] = 1;
		memcpy(in + len, id, id_len);
		len += id_len;
	}
	if(!hash__sha256(&(struct slice){in, len}, 1, digest)){
		return false;
	}
	memcpy(&out->tag, digest, sizeof(out->tag));
	out->tag |= 1; /* 0 is an empty slot */
	out->set = (digest[8] | (size_t)digest[9] << 8) % THROTTLE_SETS;
	return true;
}


static uint32_t drained(uint32_t level, int64_t seen, int64_t now, uint32_t limit)
{
	uint64_t gone = now > seen ? (uint64_t)(now - seen) * limit : 0;

	return gone >= level ? 0 : level - (uint32_t)gone;
}


static bool full(const struct throttle *throttle, const struct place *place, uint32_t limit, int64_t now)
{
	size_t i;

	for(i = 0; i < THROTTLE_WAYS; i++){
		if(throttle->slots[place->set][i].tag == place->tag){
			/* Room for one more failure, or none. */
			return drained(throttle->slots[place->set][i].level, throttle->slots[place->set][i].seen, now, limit)
					> (limit - 1) * MINUTE;
		}
	}
	return false;
}


static void add(struct throttle *throttle, const struct place *place, uint32_t limit, int64_t now)
{
	size_t i, at = 0;

	for(i = 0; i < THROTTLE_WAYS; i++){
		if(throttle->slots[place->set][i].tag == place->tag){
			at = i;
			break;
		}
		if(throttle->slots[place->set][i].level < throttle->slots[place->set][at].level
				|| (throttle->slots[place->set][i].level == throttle->slots[place->set][at].level
				&& throttle->slots[place->set][i].seen < throttle->slots[place->set][at].seen)){
			at = i;
		}
	}
	if(throttle->slots[place->set][at].tag != place->tag){
		throttle->slots[place->set][at].tag = place->tag;
		throttle->slots[place->set][at].level = 0;
	}
	throttle->slots[place->set][at].level = drained(throttle->slots[place->set][at].level,
			throttle->slots[place->set][at].seen, now, limit) + MINUTE;
	throttle->slots[place->set][at].seen = now;
}


bool throttle__blocked(struct throttle *throttle, const struct moment *from, const char *id, int64_t now)
{
	struct place pair, address;

	if(!find_place(throttle, from, id, &pair) || (from && !find_place(throttle, from, NULL, &address))){
		return true;
	}
	return full(throttle, &pair, throttle->limit, now)
			|| (from && full(throttle, &address, throttle->limit * THROTTLE_ADDRESS_FACTOR, now));
}


void throttle__failed(struct throttle *throttle, const struct moment *from, const char *id, int64_t now)
{
	struct place place;

	if(find_place(throttle, from, id, &place)){
		add(throttle, &place, throttle->limit, now);
	}
	if(from && find_place(throttle, from, NULL, &place)){
		add(throttle, &place, throttle->limit * THROTTLE_ADDRESS_FACTOR, now);
	}
}


void throttle__succeeded(struct throttle *throttle, const struct moment *from, const char *id)
{
	struct place place;
	size_t i;

	if(!find_place(throttle, from, id, &place)){
		return;
	}
	for(i = 0; i < THROTTLE_WAYS; i++){
		if(throttle->slots[place.set][i].tag == place.tag){
			throttle->slots[place.set][i].tag = 0;
			throttle->slots[place.set][i].level = 0;
		}
	}
}
