/* SPDX-License-Identifier: Apache-2.0
 *
 * The audit: one line of JSON for each refusal, in ASCII, so that whatever a client calls itself or writes to cannot
 * reach the reader of the log as control characters or as a line of its own.
 */
#include "bednet.h"

#include <stdio.h>
#include <string.h>

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


bool audit__may(struct audit *audit, enum audit_kind kind, int64_t now, uint64_t *suppressed)
{
	if(audit->buckets[kind].second != now){
		audit->buckets[kind].second = now;
		audit->buckets[kind].used = 0;
	}
	if(audit->buckets[kind].used >= audit->rate){
		audit->buckets[kind].suppressed++;
		return false;
	}
	audit->buckets[kind].used++;
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
