/* SPDX-License-Identifier: Apache-2.0
 *
 * The audit: one line of JSON for each refusal, in ASCII, so that whatever a client calls itself or writes to cannot
 * reach the reader of the log as control characters or as a line of its own.
 *
 * There are so many lines a second for each kind, and no one may use them up: a device that is known gets a quarter of
 * them, a stranger's address likewise, and all strangers of one network (/24, /64) half. Who wrote in this second is kept
 * in a table of fixed size, which only written lines get into.
 */
#include "bednet.h"

#include <stdio.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/rand.h>

#define ELLIPSIS "\\u2026"
#define ESCAPE_MAX 12 /* bytes that one character may take: a surrogate pair */

/* Room for what a client sends, in bytes of the line. With all of them used the line stays below AUDIT_LINE. */
#define ROOM_ID 100
#define ROOM_ADDRESS 64
#define ROOM_TOPIC 220
#define ROOM_RULE 140


const char *reason__name(enum reason reason)
{
	switch(reason){
		case REASON_NONE: return "none";
		case REASON_UNKNOWN_DEVICE: return "unknown-device";
		case REASON_REVOKED: return "revoked";
		case REASON_CERTIFICATE_REVOKED: return "certificate-revoked";
		case REASON_CERTIFICATE_TIME: return "certificate-time";
		case REASON_METHOD: return "method";
		case REASON_CLIENT_ID: return "client-id";
		case REASON_USERNAME: return "username";
		case REASON_PASSWORD: return "password";
		case REASON_THROTTLED: return "throttled";
		case REASON_UNTIL: return "until";
		case REASON_NOT_ALLOWED: return "not-allowed";
		case REASON_DENIED: return "denied";
		case REASON_PARTLY: return "partly";
		case REASON_STORE: return "store";
		case REASON_TOKEN_MALFORMED: return "token-malformed";
		case REASON_TOKEN_TYPE: return "token-type";
		case REASON_TOKEN_ALGORITHM: return "token-algorithm";
		case REASON_TOKEN_ISSUER: return "token-issuer";
		case REASON_TOKEN_KEY: return "token-key";
		case REASON_TOKEN_SIGNATURE: return "token-signature";
		case REASON_TOKEN_AUDIENCE: return "token-audience";
		case REASON_TOKEN_EXPIRED: return "token-expired";
		case REASON_TOKEN_EARLY: return "token-early";
		case REASON_TOKEN_LIFETIME: return "token-lifetime";
		case REASON_TOKEN_BINDING: return "token-binding";
		case REASON_TOKEN_REVOKED: return "token-revoked";
		case REASON_TOKEN_SCOPE: return "token-scope";
		case REASON_TOKEN_CLAIMS: return "token-claims";
		case REASON_TOKEN_PROOF: return "token-proof";
		case REASON_INTERNAL: break;
	}
	return "internal";
}


bool audit__init(struct audit *audit, uint32_t rate)
{
	memset(audit, 0, sizeof(*audit));
	audit->rate = rate;
	return RAND_bytes(audit->key, sizeof(audit->key)) == 1;
}


/* Whose line it is: a device that has proved who it is, or the address, whole or its network, of one that has not. */
static size_t name_sender(const struct audit_event *event, enum audit_kind kind, bool network, uint8_t *out)
{
	struct moment from;
	size_t len;

	if(kind != AUDIT_CONNECT && event->device){
		len = strnlen(event->device, BEDNET_ID_MAX + 1);
		memcpy(out, event->device, len);
		return len;
	}
	decide__address(event->address, &from);
	if(network){
		memset(from.address + (from.family == 4 ? 3 : 8), 0, sizeof(from.address) - (from.family == 4 ? 3 : 8));
	}
	out[0] = from.family;
	memcpy(out + 1, from.address, sizeof(from.address));
	return 1 + sizeof(from.address);
}


/* How much a sender has written in this second, to be counted up; NULL when there is nothing, or no place is made. */
static uint32_t *find_sender(struct audit *audit, const struct audit_event *event, enum audit_kind kind, bool network,
		int64_t now, bool make)
{
	uint8_t in[sizeof(audit->key) + 2 + BEDNET_ID_MAX + 1], digest[HASH_LEN];
	const uint32_t second = (uint32_t)now;
	size_t len = sizeof(audit->key), set, i, at = 0;
	uint64_t tag;

	memcpy(in, audit->key, len);
	in[len++] = (uint8_t)kind;
	in[len++] = network;
	len += name_sender(event, kind, network, in + len);
	if(!hash__sha256(&(struct slice){in, len}, 1, digest)){
		return NULL;
	}
	memcpy(&tag, digest, sizeof(tag));
	set = (digest[8] | (size_t)digest[9] << 8) % AUDIT_SETS;
	for(i = 0; i < AUDIT_WAYS; i++){
		if(audit->senders[set][i].second != second){
			audit->senders[set][i].used = 0; /* free */
		}
		if(audit->senders[set][i].used && audit->senders[set][i].tag == tag){
			return &audit->senders[set][i].used;
		}
		if(audit->senders[set][i].used < audit->senders[set][at].used){
			at = i;
		}
	}
	if(!make){
		return NULL;
	}
	/* Where all are taken, the one that wrote least is forgotten. */
	audit->senders[set][at].tag = tag;
	audit->senders[set][at].second = second;
	audit->senders[set][at].used = 0;
	return &audit->senders[set][at].used;
}


static bool has_share(struct audit *audit, const struct audit_event *event, enum audit_kind kind, bool network,
		int64_t now)
{
	const uint32_t share = audit->rate / (network ? AUDIT_NETWORK : AUDIT_SENDER);
	const uint32_t *used = find_sender(audit, event, kind, network, now, false);

	return used == NULL || *used < (share ? share : 1);
}


static void charge(struct audit *audit, const struct audit_event *event, enum audit_kind kind, bool network, int64_t now)
{
	uint32_t *used = find_sender(audit, event, kind, network, now, true);

	if(used){
		(*used)++;
	}
}


bool audit__may(struct audit *audit, enum audit_kind kind, const struct audit_event *event, int64_t now,
		uint64_t *suppressed)
{
	const bool stranger = kind == AUDIT_CONNECT || event->device == NULL;

	if(audit->buckets[kind].second != now){
		audit->buckets[kind].second = now;
		audit->buckets[kind].used = 0;
	}
	if(audit->buckets[kind].used >= audit->rate || !has_share(audit, event, kind, false, now)
			|| (stranger && !has_share(audit, event, kind, true, now))){
		audit->buckets[kind].suppressed++;
		return false;
	}
	audit->buckets[kind].used++;
	charge(audit, event, kind, false, now);
	if(stranger){
		charge(audit, event, kind, true, now);
	}
	*suppressed = audit->buckets[kind].suppressed;
	audit->buckets[kind].suppressed = 0;
	return true;
}


/* The next character of UTF-8 and its length; one byte that is none becomes U+FFFD. */
static uint32_t decode(const uint8_t *at, size_t len, size_t *used)
{
	static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
	uint32_t code;
	size_t need, i;

	*used = 1;
	if(at[0] < 0x80){
		return at[0];
	}
	if((at[0] & 0xE0) == 0xC0){
		need = 2;
		code = at[0] & 0x1F;
	}else if((at[0] & 0xF0) == 0xE0){
		need = 3;
		code = at[0] & 0x0F;
	}else if((at[0] & 0xF8) == 0xF0){
		need = 4;
		code = at[0] & 0x07;
	}else{
		return 0xFFFD;
	}
	if(len < need){
		return 0xFFFD;
	}
	for(i = 1; i < need; i++){
		if((at[i] & 0xC0) != 0x80){
			return 0xFFFD;
		}
		code = code << 6 | (at[i] & 0x3F);
	}
	if(code < least[need] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)){
		return 0xFFFD;
	}
	*used = need;
	return code;
}


size_t audit__escape(const char *text, size_t len, char *out, size_t room)
{
	const uint8_t *at = (const uint8_t *)text;
	const size_t keep = sizeof(ELLIPSIS) - 1;
	size_t written = 0;

	while(len > 0){
		char escaped[ESCAPE_MAX + 1];
		size_t used, size;
		uint32_t code = decode(at, len, &used);
		int rc;

		if(code == '"' || code == '\\'){
			rc = snprintf(escaped, sizeof(escaped), "\\%c", (int)code);
		}else if(code >= 0x20 && code < 0x7F){
			rc = snprintf(escaped, sizeof(escaped), "%c", (int)code);
		}else if(code > 0xFFFF){
			rc = snprintf(escaped, sizeof(escaped), "\\u%04x\\u%04x", (unsigned int)(0xD800 + ((code - 0x10000) >> 10)),
					(unsigned int)(0xDC00 + ((code - 0x10000) & 0x3FF)));
		}else{
			rc = snprintf(escaped, sizeof(escaped), "\\u%04x", (unsigned int)code);
		}
		size = rc < 0 ? 0 : (size_t)rc;
		if(written + size + (len > used ? keep : 0) > room){
			if(room >= written + keep){
				memcpy(out + written, ELLIPSIS, keep);
				written += keep;
			}
			break;
		}
		memcpy(out + written, escaped, size);
		written += size;
		at += used;
		len -= used;
	}
	return written;
}


static size_t put(char out[AUDIT_LINE], size_t used, const char *text, size_t len)
{
	if(len < AUDIT_LINE - used){
		memcpy(out + used, text, len);
		used += len;
	}
	return used;
}


static size_t put_pair(char out[AUDIT_LINE], size_t used, const char *name, const char *text, size_t len, size_t room)
{
	char escaped[ROOM_TOPIC];

	if(text == NULL){
		return used;
	}
	used = put(out, used, ",\"", 2);
	used = put(out, used, name, strlen(name));
	used = put(out, used, "\":\"", 3);
	used = put(out, used, escaped, audit__escape(text, len, escaped, room));
	return put(out, used, "\"", 1);
}


static size_t put_text(char out[AUDIT_LINE], size_t used, const char *name, const char *text, size_t room)
{
	return put_pair(out, used, name, text, text ? strlen(text) : 0, room);
}


size_t audit__format(const struct audit_event *event, uint64_t suppressed, char out[AUDIT_LINE])
{
	const char start[] = "{\"bednet\":\"audit\"";
	char number[40];
	size_t used = put(out, 0, start, sizeof(start) - 1);
	int rc;

	used = put_text(out, used, "event", event->event, ROOM_ADDRESS);
	used = put_text(out, used, "action", event->action, ROOM_ADDRESS);
	used = put_text(out, used, "device", event->device, ROOM_ID);
	used = put_text(out, used, "client_id", event->client_id, ROOM_ID);
	used = put_text(out, used, "address", event->address, ROOM_ADDRESS);
	used = put_text(out, used, "topic", event->topic, ROOM_TOPIC);
	used = put_text(out, used, "reason", reason__name(event->reason), ROOM_ADDRESS);
	used = put_pair(out, used, "rule", event->rule, event->rule_len, ROOM_RULE);
	rc = snprintf(number, sizeof(number), ",\"suppressed\":%llu}", (unsigned long long)suppressed);
	used = put(out, used, number, rc < 0 ? 0 : (size_t)rc);
	out[used] = '\0';
	return used;
}
