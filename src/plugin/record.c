/* SPDX-License-Identifier: Apache-2.0
 *
 * The records of the store, layout 2 (docs/store.md). What is written there is believed only as far as it parses: a
 * length that leads out of its record, a flag that we do not know or a byte too many make it worthless, and the device
 * that it belongs to is refused.
 */
#include "bednet.h"

#include <string.h>

#define META_MAGIC "BEDNETST"


static bool take(struct slice *bytes, size_t len, struct slice *out)
{
	if(bytes->len < len){
		return false;
	}
	out->at = bytes->at;
	out->len = len;
	bytes->at += len;
	bytes->len -= len;
	return true;
}


/* An unsigned integer of `width` bytes, little-endian. */
static bool take_int(struct slice *bytes, size_t width, uint64_t *out)
{
	struct slice raw;

	if(!take(bytes, width, &raw)){
		return false;
	}
	*out = 0;
	while(width-- > 0){
		*out = *out << 8 | raw.at[width];
	}
	return true;
}


static bool take_u8(struct slice *bytes, uint8_t *out)
{
	uint64_t value;

	if(!take_int(bytes, 1, &value)){
		return false;
	}
	*out = (uint8_t)value;
	return true;
}


static bool take_u32(struct slice *bytes, uint32_t *out)
{
	uint64_t value;

	if(!take_int(bytes, 4, &value)){
		return false;
	}
	*out = (uint32_t)value;
	return true;
}


static bool take_i64(struct slice *bytes, int64_t *out)
{
	uint64_t value;

	if(!take_int(bytes, 8, &value)){
		return false;
	}
	memcpy(out, &value, sizeof(*out));
	return true;
}


/* text8 and text16: a length and so many bytes. */
static bool take_text(struct slice *bytes, size_t width, struct slice *out)
{
	uint64_t len;

	return take_int(bytes, width, &len) && take(bytes, (size_t)len, out);
}


bool record__id_ok(const char *id, size_t len)
{
	size_t i;

	if(len == 0 || len > BEDNET_ID_MAX){
		return false;
	}
	for(i = 0; i < len; i++){
		char c = id[i];
		bool alphanumeric = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');

		if(!alphanumeric && (i == 0 || (c != '_' && c != '-'))){
			return false;
		}
	}
	return true;
}


bool record__meta(struct slice bytes, struct meta_record *out)
{
	struct slice magic;
	uint64_t devices, profiles;
	uint32_t zero;

	return take(&bytes, strlen(META_MAGIC), &magic) && memcmp(magic.at, META_MAGIC, magic.len) == 0
			&& take_u32(&bytes, &out->layout) && take_u32(&bytes, &zero) && zero == 0
			&& take_int(&bytes, 8, &out->last_change)
			&& take_int(&bytes, 8, &devices) && take_int(&bytes, 8, &profiles) && bytes.len == 0;
}


bool record__device(struct slice bytes, struct device_record *out)
{
	const uint8_t known = FLAG_REVOKED | FLAG_CERTIFICATE | FLAG_PASSWORD | FLAG_PSK | FLAG_TOKEN;
	uint8_t version;
	size_t i;

	if(!take_u8(&bytes, &version) || version != 1
			|| !take_u8(&bytes, &out->flags) || (out->flags & ~known)
			|| !take_u8(&bytes, &out->revoked_reason) || !take_u8(&bytes, &out->value_count)
			|| !take_int(&bytes, 8, &out->profile) || !take_i64(&bytes, &out->until) || out->until < 0){
		return false;
	}
	if(out->until == 0){
		out->until = BEDNET_NEVER;
	}
	for(i = 0; i < out->value_count; i++){
		const struct slice *value = &out->values[i];

		/* What is put in place of a placeholder stays within its level. */
		if(!take_text(&bytes, 1, &out->values[i]) || value->len == 0
				|| memchr(value->at, '/', value->len) || memchr(value->at, '+', value->len)
				|| memchr(value->at, '#', value->len) || memchr(value->at, 0, value->len)){
			return false;
		}
	}
	if(out->flags & FLAG_PASSWORD){
		if(!take_u32(&bytes, &out->iterations) || out->iterations == 0 || out->iterations > RECORD_ITERATIONS_MAX
				|| !take_text(&bytes, 1, &out->salt) || out->salt.len < RECORD_SALT_MIN
				|| !take_text(&bytes, 1, &out->hash)
				|| out->hash.len < RECORD_HASH_MIN || out->hash.len > RECORD_HASH_MAX){
			return false;
		}
	}
	if(out->flags & FLAG_PSK){
		if(!take_text(&bytes, 1, &out->psk) || out->psk.len < RECORD_PSK_MIN){
			return false;
		}
	}
	return bytes.len == 0;
}


bool record__profile(struct slice bytes, struct profile_cursor *out)
{
	uint8_t version, zero;
	uint64_t count;

	if(!take_u8(&bytes, &version) || version != 1 || !take_u8(&bytes, &zero) || zero != 0
			|| !take_int(&bytes, 2, &count)){
		return false;
	}
	out->rest = bytes;
	out->left = (uint32_t)count;
	return true;
}


bool record__window(struct slice *windows, struct window *out)
{
	const uint32_t day = 86400;
	uint8_t zero8;
	uint64_t zero16;

	return take_u8(windows, &out->days) && out->days > 0 && out->days < 0x80 && take_u8(windows, &zero8) && zero8 == 0
			&& take_int(windows, 2, &zero16) && zero16 == 0
			&& take_u32(windows, &out->from) && out->from < day && take_u32(windows, &out->to) && out->to <= day
			&& take_u32(windows, &out->zone);
}


bool record__network(struct slice *networks, struct network *out)
{
	struct slice address;

	memset(out, 0, sizeof(*out));
	if(!take_u8(networks, &out->family) || (out->family != 4 && out->family != 6)
			|| !take_u8(networks, &out->prefix) || out->prefix > (out->family == 4 ? 32 : 128)
			|| !take(networks, out->family == 4 ? 4 : 16, &address)){
		return false;
	}
	memcpy(out->address, address.at, address.len);
	return true;
}


int record__next_rule(struct profile_cursor *cursor, struct profile_rule *out)
{
	struct slice start;
	struct window window;
	struct network network;
	unsigned int i;

	if(cursor->left == 0){
		return cursor->rest.len == 0 ? 0 : -1;
	}
	cursor->left--;
	if(!take_text(&cursor->rest, 1, &out->id) || out->id.len == 0
			|| !take_u8(&cursor->rest, &out->effect) || out->effect < 1 || out->effect > 2
			|| !take_u8(&cursor->rest, &out->access) || out->access < 1 || out->access > 2
			|| !take_u8(&cursor->rest, &out->window_count) || !take_u8(&cursor->rest, &out->network_count)){
		return -1;
	}
	start = cursor->rest;
	for(i = 0; i < out->window_count; i++){
		if(!record__window(&cursor->rest, &window)){
			return -1;
		}
	}
	out->windows = (struct slice){start.at, start.len - cursor->rest.len};
	start = cursor->rest;
	for(i = 0; i < out->network_count; i++){
		if(!record__network(&cursor->rest, &network)){
			return -1;
		}
	}
	out->networks = (struct slice){start.at, start.len - cursor->rest.len};
	if(!take_text(&cursor->rest, 2, &out->topic) || out->topic.len == 0){
		return -1;
	}
	return 1;
}


bool record__zone(struct slice bytes, int64_t at, int32_t *offset, int64_t *from, int64_t *until)
{
	const size_t width = 12; /* bytes of a transition */
	const int32_t day = 86400;
	struct slice entry;
	uint32_t count, low = 0, high, raw;
	int64_t starts;

	if(!take_u32(&bytes, &count) || count == 0 || bytes.len % width != 0 || bytes.len / width != count){
		return false;
	}
	/* The last one that starts at or before `at`. */
	high = count;
	while(low < high){
		uint32_t middle = low + (high - low) / 2;

		entry = (struct slice){bytes.at + middle * width, width};
		if(!take_i64(&entry, &starts)){
			return false;
		}
		if(starts <= at){
			low = middle + 1;
		}else{
			high = middle;
		}
	}
	*until = BEDNET_NEVER;
	if(low < count){
		entry = (struct slice){bytes.at + low * width, width};
		if(!take_i64(&entry, until)){
			return false;
		}
	}
	if(low == 0){
		return false; /* it must begin before all times */
	}
	entry = (struct slice){bytes.at + (low - 1) * width, width};
	if(!take_i64(&entry, from) || !take_u32(&entry, &raw)){
		return false;
	}
	memcpy(offset, &raw, sizeof(*offset));
	return *offset > -2 * day && *offset < 2 * day && *from <= at && at < *until;
}


bool record__text(struct slice *texts, size_t width, struct slice *out)
{
	return take_text(texts, width, out);
}


/* So many texts, and where they are. */
static bool take_texts(struct slice *bytes, size_t width, uint8_t *count, struct slice *out)
{
	struct slice text;
	size_t i;

	if(!take_u8(bytes, count)){
		return false;
	}
	*out = *bytes;
	for(i = 0; i < *count; i++){
		if(!take_text(bytes, width, &text)){
			return false;
		}
	}
	out->len -= bytes->len;
	return true;
}


bool record__mapping(struct slice *mappings, struct role_mapping *out)
{
	return take_text(mappings, 2, &out->value) && take_int(mappings, 8, &out->profile)
			&& take_texts(mappings, 1, &out->claim_count, &out->claims);
}


bool record__issuer(struct slice bytes, struct issuer_record *out)
{
	const uint8_t known = ISSUER_AIF | ISSUER_ROLES | ISSUER_SERVICE | ISSUER_SPACED;
	const uint16_t algorithms = ALGORITHM_ES256 | ALGORITHM_EDDSA | ALGORITHM_RS256 | ALGORITHM_PS256;
	struct role_mapping mapping;
	uint8_t version;
	uint64_t raw;
	size_t i;

	if(!take_u8(&bytes, &version) || version != 1 || !take_u8(&bytes, &out->flags) || (out->flags & ~known)
			|| !take_int(&bytes, 2, &raw) || raw == 0 || (raw & ~(uint64_t)algorithms)
			|| !take_u32(&bytes, &out->leeway) || out->leeway > RECORD_LEEWAY_MAX
			|| !take_u32(&bytes, &out->longest) || out->longest == 0
			|| !take_text(&bytes, 2, &out->iss) || out->iss.len == 0
			|| !take_texts(&bytes, 2, &out->audience_count, &out->audiences) || out->audience_count == 0
			|| !take_texts(&bytes, 1, &out->type_count, &out->types) || out->type_count == 0
			|| !take_text(&bytes, 1, &out->claim) || out->claim.len == 0
			|| !take_text(&bytes, 1, &out->prefix) || !take_text(&bytes, 1, &out->roles)
			|| (out->roles.len > 0) != ((out->flags & ISSUER_ROLES) != 0)
			|| ((out->flags & ISSUER_SPACED) && !(out->flags & ISSUER_ROLES))
			|| !take_u8(&bytes, &out->mapping_count)){
		return false;
	}
	out->algorithms = (uint16_t)raw;
	out->mappings = bytes;
	for(i = 0; i < out->mapping_count; i++){
		if(!record__mapping(&bytes, &mapping)){
			return false;
		}
	}
	return bytes.len == 0;
}


bool record__key(struct slice bytes, struct key_record *out)
{
	uint8_t version;

	return take_u8(&bytes, &version) && version == 1 && take_u8(&bytes, &out->algorithm)
			&& (out->algorithm == ALGORITHM_ES256 || out->algorithm == ALGORITHM_EDDSA
			|| out->algorithm == ALGORITHM_RS256 || out->algorithm == ALGORITHM_PS256)
			&& take_text(&bytes, 1, &out->kid) && take_text(&bytes, 2, &out->spki) && out->spki.len > 0 && bytes.len == 0;
}


bool record__seconds(struct slice bytes, int64_t *out)
{
	return take_i64(&bytes, out) && bytes.len == 0;
}


bool record__change(struct slice key, struct slice value, uint64_t *sequence, uint8_t *kind, struct slice *subject)
{
	size_t i;

	if(key.len != 8 || !take_u8(&value, kind)){
		return false;
	}
	*sequence = 0;
	for(i = 0; i < key.len; i++){
		*sequence = *sequence << 8 | key.at[i];
	}
	*subject = value;
	return true;
}
