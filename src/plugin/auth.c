/* SPDX-License-Identifier: Apache-2.0
 *
 * MQTT 5 enhanced authentication: what clients send (OAUTHBEARER, RFC 7628; `ace`, RFC 9431), and what those were asked
 * who are to prove that a token's key is their own.
 *
 * A question is put to holders of a good token only, so strangers leave nothing here; of one device only a few are open at
 * a time, and none for long.
 */
#include "bednet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <openssl/rand.h>

#define SEPARATOR 0x01
#define CHALLENGES_ROOM (2 * CHALLENGES) /* with those that were pushed out and wait for the next tick */


static bool skip(struct slice *rest, const char *text)
{
	const size_t len = strlen(text);

	if(rest->len < len || strncasecmp((const char *)rest->at, text, len) != 0){
		return false;
	}
	rest->at += len;
	rest->len -= len;
	return true;
}


/* Up to a byte that must come; it is taken as well. */
static bool take_until(struct slice *rest, int end, struct slice *out)
{
	const uint8_t *found = rest->len ? memchr(rest->at, end, rest->len) : NULL;

	if(found == NULL){
		return false;
	}
	*out = (struct slice){rest->at, (size_t)(found - rest->at)};
	rest->len -= out->len + 1;
	rest->at = found + 1;
	return true;
}


bool auth__bearer(struct slice data, struct slice *authzid, struct slice *token)
{
	struct slice pair, flag;

	*authzid = *token = (struct slice){data.at, 0};
	/* gs2-header: no channel binding, which the broker could not check; perhaps a name (RFC 5801, 4) */
	if(!take_until(&data, ',', &flag) || flag.len != 1 || (*flag.at != 'n' && *flag.at != 'y')
			|| !take_until(&data, ',', authzid) || (authzid->len > 0 && !skip(authzid, "a="))
			|| data.len == 0 || *data.at != SEPARATOR){
		return false;
	}
	data.at++;
	data.len--;
	while(take_until(&data, SEPARATOR, &pair)){
		if(pair.len == 0){
			return data.len == 0 && token->len > 0;
		}
		if(!skip(&pair, "auth=")){
			continue; /* host, port, and what may come to be */
		}
		if(token->len > 0 || !skip(&pair, "Bearer ") || pair.len == 0){
			return false;
		}
		*token = pair;
	}
	return false;
}


bool auth__ace(struct slice data, struct slice *token, struct slice *rest)
{
	size_t len;

	if(data.len < 2){
		return false;
	}
	len = (size_t)data.at[0] << 8 | data.at[1];
	if(len == 0 || len > data.len - 2){
		return false;
	}
	*token = (struct slice){data.at + 2, len};
	*rest = (struct slice){data.at + 2 + len, data.len - 2 - len};
	return true;
}


void challenge__username(const struct challenge *challenge, char out[CHALLENGE_USERNAME])
{
	(void)snprintf(out, CHALLENGE_USERNAME, "?challenge/%u", challenge->number);
}


struct challenge *challenge__new(struct token *token, EVP_PKEY *key, const void *client,
		const struct certificate *certificate, const struct moment *from)
{
	struct challenge *challenge = calloc(1, sizeof(*challenge));

	if(challenge == NULL){
		token__free(token);
		EVP_PKEY_free(key);
		return NULL;
	}
	challenge->token = token;
	challenge->key = key;
	challenge->client = client;
	challenge->from = *from;
	if(certificate){
		challenge->has_certificate = true;
		challenge->certificate = *certificate;
	}
	if(RAND_bytes(challenge->nonce, sizeof(challenge->nonce)) != 1){
		challenge__free(challenge);
		return NULL;
	}
	return challenge;
}


void challenge__free(struct challenge *challenge)
{
	if(challenge){
		token__free(challenge->token);
		EVP_PKEY_free(challenge->key);
		free(challenge);
	}
}


bool challenge__answered(const struct challenge *challenge, struct slice data)
{
	uint8_t nonces[2 * TOKEN_NONCE];

	if(data.len <= TOKEN_NONCE){
		return false;
	}
	memcpy(nonces, challenge->nonce, TOKEN_NONCE);
	memcpy(nonces + TOKEN_NONCE, data.at, TOKEN_NONCE);
	return token__proven(challenge->key, nonces, (struct slice){data.at + TOKEN_NONCE, data.len - TOKEN_NONCE});
}


bool challenges__add(struct challenges *challenges, struct challenge *challenge, int64_t now)
{
	struct challenge *other, *oldest = NULL, *oldest_same = NULL;
	size_t same = 0, open = 0;

	if(challenges->count == CHALLENGES_ROOM){
		return false;
	}
	for(other = challenges->first; other; other = other->next){
		if(other->deadline == 0){
			continue;
		}
		oldest = other;
		open++;
		if(strcmp(other->token->id, challenge->token->id) == 0){
			oldest_same = other;
			same++;
		}
	}
	if(same >= CHALLENGES_SAME){
		oldest_same->deadline = 0;
	}else if(open >= CHALLENGES){
		oldest->deadline = 0;
	}
	challenge->number = ++challenges->number;
	challenge->deadline = now + CHALLENGE_SECONDS;
	challenge->next = challenges->first;
	challenges->first = challenge;
	challenges->count++;
	return true;
}


struct challenge *challenges__take(struct challenges *challenges, const void *client)
{
	struct challenge **link = &challenges->first, *challenge;

	while(*link && (*link)->client != client){
		link = &(*link)->next;
	}
	challenge = *link;
	if(challenge){
		*link = challenge->next;
		challenge->next = NULL;
		challenges->count--;
	}
	return challenge;
}


struct challenge *challenges__due(struct challenges *challenges, int64_t now)
{
	struct challenge *challenge = challenges->first;

	while(challenge && challenge->deadline > now){
		challenge = challenge->next;
	}
	return challenge;
}
