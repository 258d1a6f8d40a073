/* SPDX-License-Identifier: Apache-2.0
 *
 * Access tokens: JSON Web Tokens (RFC 7519) in the form of RFC 9068, signed (RFC 7515), and bound to their owner's key
 * (RFC 7800, RFC 8705). A token is parsed strictly and within bounds, then held against what the store says of its issuer.
 *
 * Whatever costs little is looked at first, and the signature, 0.1 ms of the broker's only thread, last: most bad tokens
 * never get so far. Which algorithm checks it is said by the key in the store; the token's own word has only to agree.
 * A header's jku, jwk, x5u and x5c are not even read.
 */
#include "bednet.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/rsa.h>

#include <yyjson.h>

#define MEMBERS_MAX 64 /* of one object: each of their names is held against all others */
#define SIGNATURE_MAX 1024 /* bytes: RSA with 8192 bits */
#define TIME_MAX ((int64_t)1 << 53) /* seconds: what a JSON number says exactly */
#define RSA_BITS_MIN 2048
#define RSA_BITS_MAX 8192
#define ROLES_MAX 16 /* of one token that mean something here */
#define VALUES_MAX 255 /* of their placeholders, together */
#define VALUE_MAX 255 /* bytes */
#define ES256_HALF 32 /* bytes of r, of s; of x, of y */
#define RESERVED "bednet-" /* no other issuer than the site's own service speaks of who begins so */

struct header {
	uint8_t algorithm; /* 0 for one that is none of ours */
	const char *typ, *kid; /* "" where there is none; they live as long as the JSON */
};

struct times {
	int64_t exp, nbf, iat;
};


/* ---- bytes and JSON ---- */

bool token__decode(const char *text, size_t len, uint8_t *out, size_t *out_len)
{
	/* What a character stands for, and one more: 0 is none. */
	static const uint8_t values[256] = {
		['A'] = 1, ['B'] = 2, ['C'] = 3, ['D'] = 4, ['E'] = 5, ['F'] = 6, ['G'] = 7, ['H'] = 8, ['I'] = 9, ['J'] = 10,
		['K'] = 11, ['L'] = 12, ['M'] = 13, ['N'] = 14, ['O'] = 15, ['P'] = 16, ['Q'] = 17, ['R'] = 18, ['S'] = 19,
		['T'] = 20, ['U'] = 21, ['V'] = 22, ['W'] = 23, ['X'] = 24, ['Y'] = 25, ['Z'] = 26, ['a'] = 27, ['b'] = 28,
		['c'] = 29, ['d'] = 30, ['e'] = 31, ['f'] = 32, ['g'] = 33, ['h'] = 34, ['i'] = 35, ['j'] = 36, ['k'] = 37,
		['l'] = 38, ['m'] = 39, ['n'] = 40, ['o'] = 41, ['p'] = 42, ['q'] = 43, ['r'] = 44, ['s'] = 45, ['t'] = 46,
		['u'] = 47, ['v'] = 48, ['w'] = 49, ['x'] = 50, ['y'] = 51, ['z'] = 52, ['0'] = 53, ['1'] = 54, ['2'] = 55,
		['3'] = 56, ['4'] = 57, ['5'] = 58, ['6'] = 59, ['7'] = 60, ['8'] = 61, ['9'] = 62, ['-'] = 63, ['_'] = 64,
	};
	uint32_t bits = 0;
	size_t i, written = 0;

	if(len % 4 == 1){
		return false;
	}
	for(i = 0; i < len; i++){
		const uint8_t value = values[(uint8_t)text[i]];

		if(value == 0){
			return false;
		}
		bits = bits << 6 | (value - 1u);
		if(i % 4 != 0){
			out[written++] = (uint8_t)(bits >> (6 - 2 * (i % 4)));
		}
	}
	*out_len = written;
	/* What is left over of the last character is zero, so that nothing can be written in two ways. */
	return len % 4 == 0 || (bits & (len % 4 == 2 ? 0x0Fu : 0x03u)) == 0;
}


/* No name is twice in an object, and nothing has a NUL: two readers could take it for two things. */
static bool is_plain(yyjson_doc *json)
{
	yyjson_val *const values = yyjson_doc_get_root(json); /* and all that it has, one behind the other */
	size_t i;

	for(i = 0; i < yyjson_doc_get_val_count(json); i++){
		yyjson_obj_iter names = yyjson_obj_iter_with(&values[i]), others;
		yyjson_val *name, *other;

		if(yyjson_obj_size(&values[i]) > MEMBERS_MAX || (yyjson_is_str(&values[i])
				&& memchr(yyjson_get_str(&values[i]), '\0', yyjson_get_len(&values[i])))){
			return false;
		}
		while((name = yyjson_obj_iter_next(&names)) != NULL){
			others = names;
			while((other = yyjson_obj_iter_next(&others)) != NULL){
				if(yyjson_equals_strn(other, yyjson_get_str(name), yyjson_get_len(name))){
					return false;
				}
			}
		}
	}
	return true;
}


/* NULL when it is none, or not plain; *reason is set then. How deep it may be is said where the reader is compiled. */
static yyjson_doc *parse(struct slice text, enum reason malformed, enum reason *reason)
{
	yyjson_read_err error = {0};
	/* Nothing is written to it without a flag that permits it. */
	yyjson_doc *json = yyjson_read_opts((char *)(uintptr_t)text.at, text.len, YYJSON_READ_NOFLAG, NULL, &error);

	if(json && is_plain(json)){
		*reason = REASON_NONE;
		return json;
	}
	*reason = error.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION ? REASON_INTERNAL : malformed;
	yyjson_doc_free(json);
	return NULL;
}


/* What a dotted path leads to, or NULL. Names may have dots themselves, as those of some providers do: of all with which the
 * path goes on, the longest that is there is taken, and no other is tried. The path is the policy's, of at most 255 bytes; each
 * step looks for no more names than it has dots. */
static yyjson_val *member(yyjson_val *object, struct slice path)
{
	while(yyjson_is_obj(object)){
		size_t len = path.len;
		yyjson_val *found;

		while((found = yyjson_obj_getn(object, (const char *)path.at, len)) == NULL){
			do{
				if(len == 0){
					return NULL;
				}
			}while(path.at[--len] != '.');
		}
		if(len == path.len){
			return found;
		}
		object = found;
		path.at += len + 1;
		path.len -= len + 1;
	}
	return NULL;
}


static bool is_text(const yyjson_val *json, struct slice text)
{
	return yyjson_is_str(json) && yyjson_get_len(json) == text.len
			&& memcmp(yyjson_get_str(json), text.at, text.len) == 0;
}


/* A text, or a list of texts of which one is it (RFC 7519, 4.1.3). */
static bool has_text(const yyjson_val *json, struct slice text)
{
	yyjson_arr_iter items = yyjson_arr_iter_with(json);
	yyjson_val *item;

	while((item = yyjson_arr_iter_next(&items)) != NULL){
		if(is_text(item, text)){
			return true;
		}
	}
	return is_text(json, text);
}


/* A text of words with a space between two, one of which is it: as scopes are written (RFC 6749, 3.3). */
static bool has_word(const yyjson_val *json, struct slice word)
{
	const char *at = yyjson_get_str(json), *end = at ? at + yyjson_get_len(json) : NULL;

	while(at){
		const char *space = memchr(at, ' ', (size_t)(end - at));

		if((size_t)((space ? space : end) - at) == word.len && memcmp(at, word.at, word.len) == 0){
			return true;
		}
		at = space ? space + 1 : NULL;
	}
	return false;
}


/* A NumericDate (RFC 7519, 2), which may have a fraction: cut off, or rounded `up`. */
static bool seconds(const yyjson_val *json, bool up, int64_t *out)
{
	const double real = yyjson_get_real(json);

	if(yyjson_is_uint(json) && yyjson_get_uint(json) <= TIME_MAX){
		*out = (int64_t)yyjson_get_uint(json);
	}else if(yyjson_is_real(json) && real >= 0 && real <= (double)TIME_MAX){
		*out = (int64_t)real;
		*out += up && (double)*out < real;
	}else{
		return false;
	}
	return *out >= 0 && *out <= TIME_MAX;
}


/* ---- the parts of a token ---- */

bool token__is(const char *text, size_t len)
{
	size_t i, dots = 0;

	if(len < 3 || memcmp(text, "eyJ", 3) != 0){ /* {" */
		return false;
	}
	for(i = 0; i < len; i++){
		dots += text[i] == '.';
	}
	return dots == 2;
}


struct token *token__read(const char *text, size_t len, enum reason *reason)
{
	const char *first = len ? memchr(text, '.', len) : NULL, *second, *end = text + len;
	struct token *token;
	uint8_t *at;

	*reason = REASON_TOKEN_MALFORMED;
	second = first ? memchr(first + 1, '.', (size_t)(end - first - 1)) : NULL;
	if(len > TOKEN_MAX || second == NULL || memchr(second + 1, '.', (size_t)(end - second - 1))){
		return NULL;
	}
	token = calloc(1, sizeof(*token) + len);
	if(token == NULL){
		*reason = REASON_INTERNAL;
		return NULL;
	}
	token->size = sizeof(*token) + 4 * len;
	token->signed_part = (struct slice){(const uint8_t *)text, (size_t)(second - text)};
	at = (uint8_t *)(token + 1);
	token->header.at = at;
	if(!token__decode(text, (size_t)(first - text), at, &token->header.len)){
		goto malformed;
	}
	at += token->header.len;
	token->payload.at = at;
	if(!token__decode(first + 1, (size_t)(second - first - 1), at, &token->payload.len)){
		goto malformed;
	}
	at += token->payload.len;
	token->signature.at = at;
	if(!token__decode(second + 1, (size_t)(end - second - 1), at, &token->signature.len)
			|| token->signature.len > SIGNATURE_MAX){
		goto malformed;
	}
	*reason = REASON_NONE;
	return token;

malformed:
	token__free(token);
	return NULL;
}


static void drop_rights(struct token *token)
{
	if(token->grants){
		token->size -= token->grants->size;
	}
	free(token->permissions);
	free(token->grants);
	token->permissions = NULL;
	token->permission_count = 0;
	token->grants = NULL;
	token->limited = token->made = false;
}


void token__free(struct token *token)
{
	if(token == NULL){
		return;
	}
	drop_rights(token);
	EVP_PKEY_free(token->proof);
	OPENSSL_cleanse(token, sizeof(*token) + token->header.len + token->payload.len + token->signature.len);
	free(token);
}


static enum reason read_header(yyjson_val *json, struct header *out)
{
	static const struct {
		const char *name;
		uint8_t algorithm;
	} known[] = {
		{"ES256", ALGORITHM_ES256}, {"EdDSA", ALGORITHM_EDDSA}, {"Ed25519", ALGORITHM_EDDSA}, /* RFC 9864 */
		{"RS256", ALGORITHM_RS256}, {"PS256", ALGORITHM_PS256},
	};
	const yyjson_val *alg = yyjson_obj_get(json, "alg"), *typ = yyjson_obj_get(json, "typ");
	const yyjson_val *kid = yyjson_obj_get(json, "kid");
	size_t i;

	/* There is no extension that we know: whatever is critical, we must not go on (RFC 7515, 4.1.11). */
	if(!yyjson_is_obj(json) || !yyjson_is_str(alg) || (typ && !yyjson_is_str(typ)) || (kid && !yyjson_is_str(kid))
			|| yyjson_obj_get(json, "crit")){
		return REASON_TOKEN_MALFORMED;
	}
	out->typ = typ ? yyjson_get_str(typ) : "";
	out->kid = kid ? yyjson_get_str(kid) : "";
	out->algorithm = 0;
	for(i = 0; i < sizeof(known) / sizeof(known[0]); i++){
		if(strcmp(yyjson_get_str(alg), known[i].name) == 0){
			out->algorithm = known[i].algorithm;
		}
	}
	return out->algorithm ? REASON_NONE : REASON_TOKEN_ALGORITHM;
}


/* RFC 7515, 4.1.9: "application/" may be left out, and case does not matter. */
static bool type_ok(const char *typ, const struct issuer_record *issuer)
{
	static const char prefix[] = "application/";
	struct slice rest = issuer->types, type;
	size_t i;

	if(strncasecmp(typ, prefix, sizeof(prefix) - 1) == 0){
		typ += sizeof(prefix) - 1;
	}
	for(i = 0; i < issuer->type_count && record__text(&rest, 1, &type); i++){
		if(strlen(typ) == type.len && strncasecmp(typ, (const char *)type.at, type.len) == 0){
			return true;
		}
	}
	return false;
}


static bool audience_ok(const yyjson_val *aud, const struct issuer_record *issuer, const char *own)
{
	struct slice rest = issuer->audiences, audience;
	size_t i;

	for(i = 0; i < issuer->audience_count && record__text(&rest, 2, &audience); i++){
		if(has_text(aud, audience)){
			return true;
		}
	}
	return own && has_text(aud, (struct slice){(const uint8_t *)own, strlen(own)});
}


static enum reason check_times(yyjson_val *claims, const struct issuer_record *issuer, int64_t now, struct times *out)
{
	const yyjson_val *nbf = yyjson_obj_get(claims, "nbf");

	out->nbf = 0;
	if(!seconds(yyjson_obj_get(claims, "exp"), false, &out->exp)
			|| !seconds(yyjson_obj_get(claims, "iat"), false, &out->iat) || (nbf && !seconds(nbf, true, &out->nbf))){
		return REASON_TOKEN_CLAIMS;
	}
	if(now >= out->exp + issuer->leeway){
		return REASON_TOKEN_EXPIRED;
	}
	if(now + issuer->leeway < out->nbf || now + issuer->leeway < out->iat){
		return REASON_TOKEN_EARLY;
	}
	return out->exp - out->iat > issuer->longest ? REASON_TOKEN_LIFETIME : REASON_NONE;
}


static bool read_id(yyjson_val *claims, const struct issuer_record *issuer, char out[BEDNET_ID_MAX + 1])
{
	const yyjson_val *claim = member(claims, issuer->claim);
	size_t len = yyjson_get_len(claim);

	if(!yyjson_is_str(claim) || len > BEDNET_ID_MAX || issuer->prefix.len > BEDNET_ID_MAX - len){
		return false;
	}
	memcpy(out, issuer->prefix.at, issuer->prefix.len);
	memcpy(out + issuer->prefix.len, yyjson_get_str(claim), len);
	len += issuer->prefix.len;
	out[len] = '\0';
	return record__id_ok(out, len);
}


/* ---- whose it is: cnf ---- */

/* Bytes of a member in base64url, of which there must be `size`. */
static bool bytes_of(const yyjson_val *object, const char *name, size_t size, uint8_t *out)
{
	const yyjson_val *json = yyjson_obj_get(object, name);
	size_t len = 0;

	return yyjson_is_str(json) && yyjson_get_len(json) == (size * 4 + 2) / 3
			&& token__decode(yyjson_get_str(json), yyjson_get_len(json), out, &len) && len == size;
}


/* A public key (RFC 7517): P-256 or Ed25519; NULL for anything else. A symmetric one has no place in a token that is not
 * encrypted (RFC 7800, 3.2). */
static EVP_PKEY *read_jwk(const yyjson_val *jwk)
{
	static const uint8_t point[] = { /* RFC 5480, 2.1.1.1: a SubjectPublicKeyInfo up to the point's x */
		0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
		0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04
	};
	const char *kty = yyjson_get_str(yyjson_obj_get(jwk, "kty")), *crv = yyjson_get_str(yyjson_obj_get(jwk, "crv"));
	uint8_t spki[sizeof(point) + 2 * ES256_HALF];
	const uint8_t *at = spki;

	if(kty == NULL || crv == NULL || yyjson_obj_get(jwk, "d")){
		return NULL;
	}
	if(strcmp(kty, "EC") == 0 && strcmp(crv, "P-256") == 0){
		memcpy(spki, point, sizeof(point));
		return bytes_of(jwk, "x", ES256_HALF, spki + sizeof(point))
				&& bytes_of(jwk, "y", ES256_HALF, spki + sizeof(point) + ES256_HALF)
				? d2i_PUBKEY(NULL, &at, sizeof(spki)) : NULL;
	}
	if(strcmp(kty, "OKP") == 0 && strcmp(crv, "Ed25519") == 0 && bytes_of(jwk, "x", 32, spki)){
		return EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, spki, 32);
	}
	return NULL;
}


/* A token without cnf is anybody's who has it. What binds it in a way that is not known here makes it nobody's. */
static enum reason check_binding(struct token *token, yyjson_val *claims, const struct token_question *question)
{
	yyjson_val *cnf = yyjson_obj_get(claims, "cnf"), *jwk = yyjson_obj_get(cnf, "jwk");
	const bool by_certificate = yyjson_obj_get(cnf, "x5t#S256") != NULL;
	uint8_t thumbprint[HASH_LEN];

	if(cnf == NULL){
		return question->proves ? REASON_TOKEN_BINDING : REASON_NONE;
	}
	if(!yyjson_is_obj(cnf) || yyjson_obj_size(cnf) != (size_t)by_certificate + (jwk != NULL)
			|| yyjson_obj_size(cnf) == 0){
		return REASON_TOKEN_BINDING;
	}
	if(by_certificate && (question->thumbprint == NULL || !bytes_of(cnf, "x5t#S256", sizeof(thumbprint), thumbprint)
			|| CRYPTO_memcmp(thumbprint, question->thumbprint, sizeof(thumbprint)) != 0)){
		return REASON_TOKEN_BINDING;
	}
	if(jwk){
		if(!question->proves){
			return REASON_TOKEN_BINDING;
		}
		EVP_PKEY_free(token->proof);
		token->proof = read_jwk(jwk);
		return token->proof ? REASON_NONE : REASON_TOKEN_BINDING;
	}
	return REASON_NONE;
}


/* ---- what it permits: scope ---- */

/* RFC 9431, 2.3: [["topic/#",["pub","sub"]],...] */
static enum reason read_permissions(struct token *token, const yyjson_val *aif)
{
	const size_t count = yyjson_arr_size(aif);
	yyjson_arr_iter entries = yyjson_arr_iter_with(aif), methods;
	struct permission *permission;
	yyjson_val *entry, *method;
	char *text;

	/* The topics are not longer than the payload that they are in. */
	token->permissions = malloc(count * sizeof(struct permission) + token->payload.len);
	if(token->permissions == NULL){
		return REASON_INTERNAL;
	}
	token->permission_count = count;
	text = (char *)&token->permissions[count];
	for(permission = token->permissions; (entry = yyjson_arr_iter_next(&entries)) != NULL; permission++){
		yyjson_val *filter = yyjson_arr_get(entry, 0);
		const size_t len = yyjson_get_len(filter);

		methods = yyjson_arr_iter_with(yyjson_arr_get(entry, 1));
		if(yyjson_arr_size(entry) != 2 || !yyjson_is_str(filter) || methods.max == 0
				|| !topics__filter_ok(yyjson_get_str(filter), len)){
			return REASON_TOKEN_SCOPE;
		}
		permission->filter = memcpy(text, yyjson_get_str(filter), len);
		permission->len = len;
		permission->publish = permission->subscribe = false;
		text += len;
		while((method = yyjson_arr_iter_next(&methods)) != NULL){
			if(yyjson_equals_str(method, "pub")){
				permission->publish = true;
			}else if(yyjson_equals_str(method, "sub")){
				permission->subscribe = true;
			}else{
				return REASON_TOKEN_SCOPE;
			}
		}
	}
	return REASON_NONE;
}


static enum reason check_scope(struct token *token, yyjson_val *claims, const struct issuer_record *issuer)
{
	const yyjson_val *scope = yyjson_obj_get(claims, "scope");
	uint8_t text[TOKEN_MAX];
	enum reason reason;
	yyjson_doc *aif;
	size_t len;

	if(!(issuer->flags & (ISSUER_AIF | ISSUER_SERVICE))){
		return REASON_NONE;
	}
	token->limited = true;
	if(!yyjson_is_str(scope) || yyjson_get_len(scope) > sizeof(text)
			|| !token__decode(yyjson_get_str(scope), yyjson_get_len(scope), text, &len)){
		return REASON_TOKEN_SCOPE;
	}
	aif = parse((struct slice){text, len}, REASON_TOKEN_SCOPE, &reason);
	if(aif){
		yyjson_val *list = yyjson_doc_get_root(aif);

		reason = yyjson_is_arr(list) ? read_permissions(token, list) : REASON_TOKEN_SCOPE;
	}
	yyjson_doc_free(aif);
	return reason;
}


bool token__permits(const struct token *token, enum access access, const char *topic, size_t len)
{
	size_t i;

	if(!token->limited){
		return true;
	}
	if(access == ACCESS_SUBSCRIBE && !topics__unshare(&topic, &len)){
		return false;
	}
	for(i = 0; i < token->permission_count; i++){
		const struct permission *permission = &token->permissions[i];

		if((access == ACCESS_PUBLISH ? permission->publish : permission->subscribe)
				&& (access == ACCESS_SUBSCRIBE ? topics__covers(permission->filter, permission->len, topic, len)
				: topics__matches(permission->filter, permission->len, topic, len))){
			return true;
		}
	}
	return false;
}


/* ---- devices that the store does not have: roles ---- */

/* What may stand in place of a placeholder, as values of the store may. */
static bool value_ok(const yyjson_val *json)
{
	const char *text = yyjson_get_str(json);
	size_t i, len = yyjson_get_len(json);

	if(text == NULL || len == 0 || len > VALUE_MAX || *text == '$'){
		return false;
	}
	for(i = 0; i < len; i++){
		const uint8_t c = (uint8_t)text[i];

		if(c < 0x20 || c == 0x7F || c == '+' || c == '#' || c == '/'){
			return false;
		}
	}
	return true;
}


/* Its rights are those of all its roles that mean something here. */
static enum reason make_device(struct token *token, yyjson_val *claims, const struct issuer_record *issuer, struct store *store)
{
	const yyjson_val *roles = member(claims, issuer->roles);
	struct slice rest = issuer->mappings, values[VALUES_MAX];
	struct grant_source sources[ROLES_MAX];
	size_t count = 0, used = 0, i, j;
	enum reason reason;

	if(!(issuer->flags & ISSUER_ROLES)){
		return REASON_UNKNOWN_DEVICE;
	}
	for(i = 0; i < issuer->mapping_count; i++){
		struct role_mapping mapping;
		struct slice claim;

		if(!record__mapping(&rest, &mapping)){
			return REASON_STORE;
		}
		if(!has_text(roles, mapping.value) && !((issuer->flags & ISSUER_SPACED) && has_word(roles, mapping.value))){
			continue;
		}
		if(count == ROLES_MAX || mapping.claim_count > VALUES_MAX - used){
			return REASON_TOKEN_CLAIMS;
		}
		reason = store__profile(store, mapping.profile, &sources[count].profile);
		if(reason != REASON_NONE){
			return reason;
		}
		sources[count].values = values + used;
		sources[count++].value_count = mapping.claim_count;
		for(j = 0; j < mapping.claim_count; j++){
			const yyjson_val *value = record__text(&mapping.claims, 1, &claim) ? member(claims, claim) : NULL;

			if(!value_ok(value)){
				return REASON_TOKEN_CLAIMS;
			}
			values[used++] = (struct slice){(const uint8_t *)yyjson_get_str(value), yyjson_get_len(value)};
		}
	}
	token->made = count > 0;
	reason = count ? decide__grants(sources, count, token->id, strlen(token->id), &token->grants) : REASON_TOKEN_CLAIMS;
	if(token->grants){
		token->size += token->grants->size;
	}
	return reason;
}


/* ---- the signature ---- */

static bool key_fits(EVP_PKEY *key, uint8_t algorithm)
{
	char group[32];

	switch(algorithm){
		case ALGORITHM_ES256:
			return EVP_PKEY_is_a(key, "EC") && EVP_PKEY_get_group_name(key, group, sizeof(group), NULL) == 1
					&& (strcmp(group, "prime256v1") == 0 || strcmp(group, "P-256") == 0);
		case ALGORITHM_EDDSA:
			return EVP_PKEY_is_a(key, "ED25519") == 1;
		case ALGORITHM_RS256:
		case ALGORITHM_PS256:
			return EVP_PKEY_is_a(key, "RSA") && EVP_PKEY_get_bits(key) >= RSA_BITS_MIN
					&& EVP_PKEY_get_bits(key) <= RSA_BITS_MAX;
	}
	return false;
}


static void forget_verifier(struct verifier *verifier)
{
	EVP_PKEY_CTX_free(verifier->ready);
	EVP_PKEY_free(verifier->key);
	memset(verifier, 0, sizeof(*verifier));
}


/* Takes the key, which may be NULL. False when it is none of this algorithm, or there is no memory. */
static bool make_verifier(EVP_PKEY *key, uint8_t algorithm, struct verifier *out)
{
	*out = (struct verifier){key, NULL, algorithm};
	if(key && key_fits(key, algorithm)){
		if(algorithm == ALGORITHM_EDDSA){
			return true;
		}
		out->ready = EVP_PKEY_CTX_new(key, NULL);
		if(out->ready && EVP_PKEY_verify_init(out->ready) == 1
				&& EVP_PKEY_CTX_set_signature_md(out->ready, EVP_sha256()) == 1
				&& (algorithm == ALGORITHM_ES256 || EVP_PKEY_CTX_set_rsa_padding(out->ready, algorithm == ALGORITHM_PS256
						? RSA_PKCS1_PSS_PADDING : RSA_PKCS1_PADDING) == 1)
				&& (algorithm != ALGORITHM_PS256
						|| EVP_PKEY_CTX_set_rsa_pss_saltlen(out->ready, RSA_PSS_SALTLEN_DIGEST) == 1)){
			return true;
		}
	}
	forget_verifier(out);
	return false;
}


/* Taking a key apart costs as much as a signature, so a few are kept: by what the store says, not by what tokens do. What is
 * returned stays the cache's; NULL when the store's key is none. */
static struct verifier *find_verifier(struct token_keys *keys, const struct key_record *key, const uint8_t print[HASH_LEN])
{
	const uint8_t *at = key->spki.at;
	struct verifier made;
	size_t i;

	for(i = 0; i < TOKEN_KEYS; i++){
		if(keys->entries[i].verifier.key && keys->entries[i].verifier.algorithm == key->algorithm
				&& memcmp(keys->entries[i].print, print, HASH_LEN) == 0){
			return &keys->entries[i].verifier;
		}
	}
	if(!make_verifier(d2i_PUBKEY(NULL, &at, (long)key->spki.len), key->algorithm, &made)){
		return NULL;
	}
	if(at != key->spki.at + key->spki.len){
		forget_verifier(&made);
		return NULL;
	}
	i = keys->next;
	keys->next = (i + 1) % TOKEN_KEYS;
	forget_verifier(&keys->entries[i].verifier);
	memcpy(keys->entries[i].print, print, HASH_LEN);
	keys->entries[i].verifier = made;
	return &keys->entries[i].verifier;
}


void token__forget_keys(struct token_keys *keys)
{
	size_t i;

	for(i = 0; i < TOKEN_KEYS; i++){
		forget_verifier(&keys->entries[i].verifier);
	}
	free(keys->seen);
	memset(keys, 0, sizeof(*keys));
}


/* An INTEGER of DER (X.690, 8.3): not negative, and in as few bytes as can be. */
static uint8_t *put_integer(const uint8_t half[ES256_HALF], uint8_t *out)
{
	size_t len = ES256_HALF;

	while(len > 1 && *half == 0){
		half++;
		len--;
	}
	*out++ = V_ASN1_INTEGER;
	*out++ = (uint8_t)(len + (*half >> 7));
	if(*half >> 7){
		*out++ = 0;
	}
	memcpy(out, half, len);
	return out + len;
}


/* `text` is what was signed, `digest` its SHA-256. */
static bool signature_ok(const struct verifier *verifier, struct slice text, const uint8_t digest[HASH_LEN],
		struct slice signature)
{
	uint8_t der[2 + 2 * (3 + ES256_HALF)], *end;
	EVP_MD_CTX *context;
	bool good;

	if(verifier->algorithm == ALGORITHM_EDDSA){
		context = EVP_MD_CTX_new();
		good = context && EVP_DigestVerifyInit(context, NULL, NULL, NULL, verifier->key) == 1
				&& EVP_DigestVerify(context, signature.at, signature.len, text.at, text.len) == 1;
		EVP_MD_CTX_free(context);
		return good;
	}
	if(verifier->algorithm == ALGORITHM_ES256){
		/* r and s (RFC 7518, 3.4); OpenSSL takes them in DER (RFC 3279, 2.2.3). */
		if(signature.len != 2 * ES256_HALF){
			return false;
		}
		end = put_integer(signature.at + ES256_HALF, put_integer(signature.at, der + 2));
		der[0] = V_ASN1_SEQUENCE | V_ASN1_CONSTRUCTED;
		der[1] = (uint8_t)(end - der - 2);
		signature = (struct slice){der, (size_t)(end - der)};
	}
	/* OpenSSL takes a shorter one for PS256, and in front of it a zero (RFC 8017, 8.1.2 does not). */
	if(verifier->algorithm != ALGORITHM_ES256 && signature.len != (size_t)EVP_PKEY_get_size(verifier->key)){
		return false;
	}
	return EVP_PKEY_verify(verifier->ready, signature.at, signature.len, digest, HASH_LEN) == 1;
}


bool token__proven(EVP_PKEY *key, const uint8_t nonces[2 * TOKEN_NONCE], struct slice signature)
{
	const struct slice text = {nonces, 2 * TOKEN_NONCE};
	struct verifier verifier;
	uint8_t digest[HASH_LEN];
	bool good;

	ERR_set_mark();
	EVP_PKEY_up_ref(key);
	good = make_verifier(key, EVP_PKEY_is_a(key, "ED25519") ? ALGORITHM_EDDSA : ALGORITHM_ES256, &verifier);
	if(good){
		good = hash__sha256(&text, 1, digest) && signature_ok(&verifier, text, digest, signature);
		forget_verifier(&verifier);
	}
	ERR_pop_to_mark();
	return good;
}


/* The signature of a token, by a key of the store. A device that lost its connection comes back with the token that it has,
 * and after an outage all of them do at once: then this costs a hash instead of a signature. */
static enum reason check_signature(const struct token *token, const struct key_record *key, struct token_keys *keys)
{
	uint8_t digest[HASH_LEN], print[HASH_LEN], (*seen)[HASH_LEN] = NULL;
	/* Of every byte of the token, and of the key and its algorithm: what was found right once is right again. */
	const struct slice parts[] = {
		{token->key_print, HASH_LEN}, {&key->algorithm, 1}, {digest, HASH_LEN}, token->signature,
	};
	struct verifier *verifier;

	if(!hash__sha256(&token->signed_part, 1, digest) || !hash__sha256(parts, sizeof(parts) / sizeof(parts[0]), print)){
		return REASON_INTERNAL;
	}
	if(keys->seen == NULL){
		keys->seen = calloc(TOKEN_SEEN, sizeof(*keys->seen)); /* without it all signatures are checked */
	}
	if(keys->seen){
		seen = &keys->seen[((size_t)print[0] << 8 | print[1]) % TOKEN_SEEN];
		if(memcmp(*seen, print, sizeof(print)) == 0){
			return REASON_NONE;
		}
	}
	verifier = find_verifier(keys, key, token->key_print);
	if(verifier == NULL){
		return REASON_STORE;
	}
	if(!signature_ok(verifier, token->signed_part, digest, token->signature)){
		return REASON_TOKEN_SIGNATURE;
	}
	if(seen){
		memcpy(*seen, print, sizeof(print));
	}
	return REASON_NONE;
}


/* ---- all of it ---- */

static enum reason check_key(struct token *token, const struct header *header, const uint8_t issuer[STORE_ISSUER_KEY],
		struct store *store, struct key_record *key)
{
	uint8_t digest[HASH_LEN];
	enum reason reason = store__key(store, issuer, header->kid, strlen(header->kid), key);

	if(reason != REASON_NONE){
		return reason;
	}
	if(key->algorithm != header->algorithm){
		return REASON_TOKEN_ALGORITHM;
	}
	if(!hash__sha256(&key->spki, 1, digest)){
		return REASON_INTERNAL;
	}
	if(token->verified && memcmp(token->key_print, digest, sizeof(token->key_print)) != 0){
		return REASON_TOKEN_KEY; /* another one under the same name */
	}
	memcpy(token->key_print, digest, sizeof(token->key_print));
	return REASON_NONE;
}


static enum reason check_claims(struct token *token, const struct header *header, yyjson_val *claims,
		const struct token_question *question)
{
	const yyjson_val *iss = yyjson_obj_get(claims, "iss"), *jti = yyjson_obj_get(claims, "jti");
	uint8_t issuer_key[STORE_ISSUER_KEY];
	struct issuer_record issuer;
	struct key_record key;
	struct device_record device;
	struct times times;
	enum reason reason;

	if(!yyjson_is_obj(claims)){
		return REASON_TOKEN_MALFORMED;
	}
	if(!yyjson_is_str(iss)){
		return REASON_TOKEN_ISSUER;
	}
	reason = store__issuer(question->store, yyjson_get_str(iss), yyjson_get_len(iss), issuer_key, &issuer);
	if(reason != REASON_NONE){
		return reason;
	}
	if(!type_ok(header->typ, &issuer)){
		return REASON_TOKEN_TYPE;
	}
	if(!(issuer.algorithms & header->algorithm)){
		return REASON_TOKEN_ALGORITHM;
	}
	reason = check_key(token, header, issuer_key, question->store, &key);
	if(reason != REASON_NONE){
		return reason;
	}
	if(!audience_ok(yyjson_obj_get(claims, "aud"), &issuer, question->audience)){
		return REASON_TOKEN_AUDIENCE;
	}
	reason = check_times(claims, &issuer, question->now, &times);
	if(reason != REASON_NONE){
		return reason;
	}
	token->end = times.exp + issuer.leeway;
	/* Without a jti a token could not be revoked by itself; our own service gives one (RFC 9068, 2.2). */
	if((jti ? !yyjson_is_str(jti) : (issuer.flags & ISSUER_SERVICE) != 0) || !read_id(claims, &issuer, token->id)){
		return REASON_TOKEN_CLAIMS;
	}
	if(!(issuer.flags & ISSUER_SERVICE) && strncmp(token->id, RESERVED, sizeof(RESERVED) - 1) == 0){
		return REASON_TOKEN_CLAIMS;
	}
	reason = token->verified ? REASON_NONE : check_binding(token, claims, question);
	if(reason == REASON_NONE){
		reason = check_scope(token, claims, &issuer);
	}
	if(reason != REASON_NONE){
		return reason;
	}
	if(!token->verified){
		reason = check_signature(token, &key, question->keys);
		if(reason != REASON_NONE){
			return reason;
		}
		token->verified = true;
		/* What is left of it in memory lets nobody in. */
		OPENSSL_cleanse((uint8_t *)(uintptr_t)token->signature.at, token->signature.len);
		token->signature.len = token->signed_part.len = 0;
		token->signed_part.at = NULL;
	}
	reason = store__token(question->store, yyjson_get_str(iss), yyjson_get_str(jti), token->id, times.iat);
	if(reason != REASON_NONE){
		return reason;
	}
	reason = store__device(question->store, token->id, strlen(token->id), &device);
	if(reason == REASON_UNKNOWN_DEVICE){
		reason = make_device(token, claims, &issuer, question->store);
	}
	return reason;
}


/* A signature that is none leaves errors in OpenSSL's queue, of which the thread has one. Mosquitto 2.0.11 takes what it finds
 * there for an error of the connection that it serves next, and ends that: so nothing is left. */
enum reason token__check(struct token *token, const struct token_question *question)
{
	yyjson_doc *json, *claims = NULL;
	struct header header = {0};
	enum reason reason;

	ERR_set_mark();
	drop_rights(token);
	json = parse(token->header, REASON_TOKEN_MALFORMED, &reason);
	if(json){
		reason = read_header(yyjson_doc_get_root(json), &header);
	}
	if(reason == REASON_NONE){
		claims = parse(token->payload, REASON_TOKEN_MALFORMED, &reason);
	}
	if(claims){
		reason = check_claims(token, &header, yyjson_doc_get_root(claims), question);
	}
	yyjson_doc_free(json);
	yyjson_doc_free(claims);
	ERR_pop_to_mark();
	return reason;
}
