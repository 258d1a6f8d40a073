/* SPDX-License-Identifier: Apache-2.0
 *
 * bednet_plugin: what its files offer to one another. docs/plugin.md tells the whole.
 *
 * Nothing here is thread-safe, and nothing needs to be: the broker calls us from its one thread.
 * Bytes from clients and from the store travel as (pointer, length) and are not NUL-terminated, unless said.
 */
#ifndef BEDNET_H
#define BEDNET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <lmdb.h>
#include <openssl/evp.h>
#include <openssl/x509.h>

#define BEDNET_ID_MAX 64 /* bytes of a device's id */
#define BEDNET_SERIAL_MAX 20 /* bytes of a certificate's serial number (RFC 5280, 4.1.2.2) */
#define BEDNET_NEVER INT64_MAX /* a time, in Unix seconds, that does not come */

/* Bytes of somebody else's. */
struct slice {
	const uint8_t *at;
	size_t len;
};

/* Why something is refused; reason__name() has the words that appear in the audit. */
enum reason {
	REASON_NONE = 0, /* it is allowed */
	REASON_UNKNOWN_DEVICE,
	REASON_REVOKED,
	REASON_CERTIFICATE_REVOKED,
	REASON_CERTIFICATE_TIME,
	REASON_METHOD,
	REASON_CLIENT_ID,
	REASON_USERNAME,
	REASON_PASSWORD,
	REASON_THROTTLED,
	REASON_UNTIL,
	REASON_NOT_ALLOWED,
	REASON_DENIED,
	REASON_PARTLY,
	REASON_STORE,
	REASON_INTERNAL,
	REASON_TOKEN_MALFORMED,
	REASON_TOKEN_TYPE,
	REASON_TOKEN_ALGORITHM,
	REASON_TOKEN_ISSUER,
	REASON_TOKEN_KEY,
	REASON_TOKEN_SIGNATURE,
	REASON_TOKEN_AUDIENCE,
	REASON_TOKEN_EXPIRED,
	REASON_TOKEN_EARLY,
	REASON_TOKEN_LIFETIME,
	REASON_TOKEN_BINDING,
	REASON_TOKEN_REVOKED,
	REASON_TOKEN_SCOPE,
	REASON_TOKEN_CLAIMS,
	REASON_TOKEN_PROOF
};

/* ---- topics.c: topic names and filters (MQTT 5, 4.7), as src/bednet/topics.py has them ---- */

/* What a PUBLISH may carry, what a SUBSCRIBE may carry. Characters are the broker's business, which checks UTF-8. */
bool topics__name_ok(const char *name, size_t len);
bool topics__filter_ok(const char *filter, size_t len);

/* Turns $share/GROUP/FILTER into FILTER, in place; false when it begins so and is malformed. */
bool topics__unshare(const char **filter, size_t *len);

/* Does `ours` match every topic name that `theirs` matches? */
bool topics__covers(const char *ours, size_t ours_len, const char *theirs, size_t theirs_len);

/* Does a filter match a topic name? */
bool topics__matches(const char *filter, size_t filter_len, const char *name, size_t name_len);

/* Writes the filter for what both match; `out` has room for one_len + other_len + 2 bytes.
 * Returns its length, 0 when nothing is matched by both. With out == NULL: non-zero when something is. */
size_t topics__intersection(const char *one, size_t one_len, const char *other, size_t other_len, char *out);

/* ---- record.c: the records of the store. Every byte is checked; nothing is allocated ---- */

enum { FLAG_REVOKED = 1, FLAG_CERTIFICATE = 2, FLAG_PASSWORD = 4, FLAG_PSK = 8, FLAG_TOKEN = 16 };
enum { ISSUER_AIF = 1, ISSUER_ROLES = 2, ISSUER_SERVICE = 4, ISSUER_SPACED = 8 };
enum { ALGORITHM_ES256 = 1, ALGORITHM_EDDSA = 2, ALGORITHM_RS256 = 4, ALGORITHM_PS256 = 8 };

#define RECORD_LAYOUT 2
#define RECORD_ITERATIONS_MAX 10000 /* of PBKDF2: 9 ms of the broker's only thread; bednet-ca asks for 101 */
#define RECORD_HASH_MIN 32 /* bytes */
#define RECORD_HASH_MAX 64 /* bytes: one block of SHA-512 */
#define RECORD_SALT_MIN 1 /* bytes */
#define RECORD_PSK_MIN 16 /* bytes: 128 bits */
#define RECORD_LEEWAY_MAX 300 /* seconds */

struct meta_record {
	uint32_t layout;
	uint64_t last_change;
};

struct device_record {
	uint8_t flags;
	uint8_t revoked_reason;
	uint8_t value_count;
	uint64_t profile;
	int64_t until; /* BEDNET_NEVER when there is no end */
	struct slice values[255];
	uint32_t iterations;
	struct slice salt, hash, psk;
};

/* An issuer of tokens. */
struct issuer_record {
	uint8_t flags;
	uint16_t algorithms;
	uint32_t leeway, longest; /* seconds */
	struct slice iss, claim, prefix, roles;
	uint8_t audience_count, type_count, mapping_count;
	struct slice audiences, types, mappings; /* read with record__text, record__mapping */
};

/* What a role of an issuer means here: a profile, and where the token has what its placeholders stand for. */
struct role_mapping {
	struct slice value;
	uint64_t profile;
	uint8_t claim_count;
	struct slice claims;
};

/* A public key of an issuer. */
struct key_record {
	uint8_t algorithm;
	struct slice kid, spki; /* SubjectPublicKeyInfo in DER */
};

struct window {
	uint32_t from, to; /* seconds of the day; to <= from runs past midnight */
	uint32_t zone;
	uint8_t days; /* bit 0 is Monday */
};

struct network {
	uint8_t family; /* 4 or 6 */
	uint8_t prefix; /* bits */
	uint8_t address[16];
};

struct profile_cursor {
	struct slice rest;
	uint32_t left; /* rules */
};

struct profile_rule {
	struct slice id, topic;
	uint8_t effect, access;
	uint8_t window_count, network_count;
	struct slice windows, networks; /* read with record__window, record__network */
};

bool record__meta(struct slice bytes, struct meta_record *out);
bool record__device(struct slice bytes, struct device_record *out);
bool record__profile(struct slice bytes, struct profile_cursor *out);
/* 1 and a rule, 0 at the end, -1 when the rest does not parse. */
int record__next_rule(struct profile_cursor *cursor, struct profile_rule *out);
bool record__window(struct slice *windows, struct window *out);
bool record__network(struct slice *networks, struct network *out);
/* The offset at a time, and from when until when it holds. */
bool record__zone(struct slice bytes, int64_t at, int32_t *offset, int64_t *from, int64_t *until);
bool record__issuer(struct slice bytes, struct issuer_record *out);
/* The next text, whose length has so many bytes (2 for audiences, 1 for types and claims). */
bool record__text(struct slice *texts, size_t width, struct slice *out);
bool record__mapping(struct slice *mappings, struct role_mapping *out);
bool record__key(struct slice bytes, struct key_record *out);
bool record__seconds(struct slice bytes, int64_t *out);
bool record__change(struct slice key, struct slice value, uint64_t *sequence, uint8_t *kind, struct slice *subject);
/* May it be the id of a device? Nothing that has a meaning in topics or JSON passes. */
bool record__id_ok(const char *id, size_t len);

/* ---- decide.c: the decision, as src/bednet/policy.py has it ---- */

enum effect { EFFECT_ALLOW = 1, EFFECT_DENY = 2 };
enum access { ACCESS_PUBLISH = 1, ACCESS_SUBSCRIBE = 2, ACCESS_DELIVER = 3 };

/* A rule as it applies to one device, its placeholders filled in. */
struct grant {
	const char *id, *filter;
	size_t filter_len;
	const struct window *windows;
	const struct network *networks;
	uint8_t id_len, effect, access, window_count, network_count;
};

struct grants {
	size_t count;
	size_t size; /* bytes, of all of it */
	struct grant list[]; /* what they point to lies behind them, in the same block */
};

/* A profile, and what its placeholders 1, 2, .. stand for. */
struct grant_source {
	struct slice profile;
	const struct slice *values;
	uint8_t value_count;
};

/* When, and from where. */
struct moment {
	bool has_time;
	int64_t now; /* Unix seconds */
	uint8_t family; /* 4, 6, or 0 when the address is not known */
	uint8_t address[16];
	bool generous; /* what is not known was as good as it may be, not as bad: for what happened before */
};

/* The offset of a zone at a time, in seconds east of UTC; false when the zone cannot be read. */
typedef bool (*zone_lookup)(void *context, uint32_t zone, int64_t at, int32_t *offset);

struct decision {
	enum reason reason;
	const struct grant *grant; /* the rule that decides, or NULL; lives as long as the grants */
};

/* The grants of all these profiles together, their placeholders filled in. The caller frees *out with free().
 * REASON_STORE when a profile does not parse or does not fit its values, REASON_INTERNAL without memory. */
enum reason decide__grants(const struct grant_source *sources, size_t source_count, const char *id, size_t id_len,
		struct grants **out);
/* `topic` is a topic name, or for ACCESS_SUBSCRIBE a topic filter, with or without $share. */
struct decision decide__by(const struct grants *grants, enum access access, const char *topic, size_t len,
		const struct moment *moment, zone_lookup zones, void *context);
/* Reads an address as the broker writes it; IPv4-mapped IPv6 is IPv4. False, and family 0, for anything else. */
bool decide__address(const char *text, struct moment *out);

/* ---- store.c: the LMDB environment ---- */

#define STORE_ZONES 16 /* offsets remembered */

struct store {
	MDB_env *env;
	MDB_txn *txn; /* reset between uses, so that it keeps no page from being used again */
	MDB_dbi meta, devices, profiles, zones, revoked, changes, issuers, keys, tokens, cutoffs;
	size_t seen_txn; /* mdb_txn_id() of the last look at the change log */
	uint64_t seen_change;
	bool unusable; /* its meta record is not ours any more: nothing is read until it is again */
	bool told;
	struct {
		uint32_t zone;
		int32_t offset;
		int64_t from, until;
	} offsets[STORE_ZONES];
};

struct change_sink {
	void (*device)(void *context, const char *id, size_t len);
	void (*issuers)(void *context); /* an issuer of tokens, or its keys */
	void (*everything)(void *context); /* serial numbers, profiles, zones, or more than one cares to count */
	void *context;
};

/* Opens it for reading; false and a sentence in `why` when it cannot be used. */
bool store__open(struct store *store, const char *path, char *why, size_t why_len);
void store__close(struct store *store);
/* Whether something was committed since store__refresh last saw it; a few nanoseconds. */
bool store__moved(const struct store *store);
/* Reads the change log as far as it has grown. False when it could not be read; then ask again later. */
bool store__refresh(struct store *store, const struct change_sink *sink);
/* Between these two the slices of the store live. */
bool store__begin(struct store *store);
void store__end(struct store *store);
/* REASON_NONE, REASON_UNKNOWN_DEVICE, REASON_STORE. */
enum reason store__device(struct store *store, const char *id, size_t len, struct device_record *out);
enum reason store__profile(struct store *store, uint64_t key, struct slice *out);
enum reason store__serial(struct store *store, const uint8_t *serial, size_t len); /* NONE, CERTIFICATE_REVOKED, STORE */
/* REASON_NONE, REASON_TOKEN_ISSUER, REASON_STORE; `key` is filled in either way. */
#define STORE_ISSUER_KEY 8 /* bytes */
enum reason store__issuer(struct store *store, const char *iss, size_t len, uint8_t key[STORE_ISSUER_KEY],
		struct issuer_record *out);
/* REASON_NONE, REASON_TOKEN_KEY, REASON_STORE. */
enum reason store__key(struct store *store, const uint8_t issuer[STORE_ISSUER_KEY], const char *kid, size_t len,
		struct key_record *out);
/* Whether a token is revoked, or issued too early for its device: REASON_NONE, REASON_TOKEN_REVOKED, REASON_STORE.
 * `jti` may be NULL. */
enum reason store__token(struct store *store, const char *iss, const char *jti, const char *id, int64_t issued);
bool store__zone(void *store, uint32_t zone, int64_t at, int32_t *offset); /* a zone_lookup */

/* ---- hash.c: SHA-256 ---- */

#define HASH_LEN 32 /* bytes */
/* Of the parts, one behind the other. False when OpenSSL has no memory for it, or no SHA-256. */
bool hash__sha256(const struct slice *parts, size_t count, uint8_t out[HASH_LEN]);
/* Gives back what is kept for the next one. */
void hash__forget(void);

/* ---- cert.c: what a client's certificate says ---- */

struct certificate {
	char id[BEDNET_ID_MAX + 1]; /* its one common name */
	uint8_t serial[BEDNET_SERIAL_MAX];
	size_t serial_len;
	int64_t not_before, not_after;
};

/* The one common name that is a device's id; false when there is none, more than one, or it is anything else. */
bool cert__name(const X509_NAME *name, char out[BEDNET_ID_MAX + 1]);
bool cert__read(const X509 *x509, struct certificate *out);
/* SHA-256 of all of it: what cnf says in x5t#S256 (RFC 8705, 3.1). */
bool cert__thumbprint(const X509 *x509, uint8_t out[HASH_LEN]);

/* ---- secret.c: passwords, and keys of nobody ---- */

/* Whether it is the password. Takes as long without a device (`device` NULL, or one without a password). */
bool secret__password(const struct device_record *device, const char *password);

#define SECRET_KEY_LEN 32 /* bytes */
/* A pre-shared key for a name that has none: always the same for a name, and known to nobody. */
bool secret__nobodys_key(const uint8_t secret[SECRET_KEY_LEN], const char *identity, uint8_t key[SECRET_KEY_LEN]);

/* ---- token.c: access tokens (RFC 7519, RFC 9068): parsed, and checked against issuers and keys of the store ---- */

#define TOKEN_MAX 8192 /* bytes, as it comes */
#define TOKEN_KEYS 8 /* public keys that are kept ready for use */
#define TOKEN_NONCE 8 /* bytes, of either side (RFC 9431, 2.2.4.2.2) */
#define TOKEN_SEEN 8192 /* signatures that need not be checked once more; a power of 2 */

/* What a scope permits (RFC 9431, 2.3). */
struct permission {
	const char *filter;
	size_t len;
	bool publish, subscribe;
};

/* A token. Until token__check has said REASON_NONE of it, nothing in it is to be believed. */
struct token {
	struct slice header, payload; /* JSON, decoded; behind the struct, in the same block */
	struct slice signature, signed_part; /* until it was checked; signed_part is the caller's */
	bool verified; /* its signature was found right */
	uint8_t key_print[HASH_LEN]; /* of the key that it was checked with */
	char id[BEDNET_ID_MAX + 1]; /* the device */
	int64_t end; /* first second in which it is good no more, leeway included */
	bool limited; /* its scope counts; else only the policy limits it */
	struct permission *permissions; /* with their text, one block */
	size_t permission_count;
	bool made; /* the store does not have the device: its rights come from the roles in the token */
	struct grants *grants; /* then */
	EVP_PKEY *proof; /* cnf.jwk: whose owner may use it (RFC 7800), or NULL */
	size_t size; /* bytes that it is taken for, roughly what it has with its permissions or grants */
	/* of whoever keeps it */
	bool stale; /* to be checked again before it is believed */
	enum reason state; /* what the last check said */
	uint64_t generation;
};

/* A public key, ready to check signatures of one algorithm. */
struct verifier {
	EVP_PKEY *key;
	EVP_PKEY_CTX *ready; /* for signatures over a hash, which are all but EdDSA's */
	uint8_t algorithm;
};

/* What makes checking tokens fast. None of it says that a token is good: only that this signature is this key's. */
struct token_keys {
	struct {
		uint8_t print[HASH_LEN]; /* of the key */
		struct verifier verifier; /* no key: free */
	} entries[TOKEN_KEYS];
	size_t next;
	uint8_t (*seen)[HASH_LEN]; /* TOKEN_SEEN of them, from the first token on */
};

/* What a token is asked about. */
struct token_question {
	struct store *store; /* between store__begin and store__end */
	struct token_keys *keys;
	const char *audience; /* of this gateway, or NULL */
	const uint8_t *thumbprint; /* SHA-256 of the certificate that the client has shown, or NULL */
	bool proves; /* the client is about to prove that it has the key of cnf.jwk */
	int64_t now;
};

/* Is this password a token? Nothing is said of whether it is a good one. */
bool token__is(const char *text, size_t len);
/* Takes it apart; NULL and a reason when it is malformed. `text` is the caller's, and is to live until token__check. */
struct token *token__read(const char *text, size_t len, enum reason *reason);
/* Whether it is good; also again, when the store has changed: then neither signature nor cnf is looked at. Cheap checks
 * come first. Whether its device may use tokens is for the caller to find out, unless the token is `made`. */
enum reason token__check(struct token *token, const struct token_question *question);
/* Whether its scope permits it; the policy must as well. `topic` as for decide__by. */
bool token__permits(const struct token *token, enum access access, const char *topic, size_t len);
/* Whether `signature` is that of the key over both nonces. P-256 and Ed25519 only. */
bool token__proven(EVP_PKEY *key, const uint8_t nonces[2 * TOKEN_NONCE], struct slice signature);
void token__free(struct token *token);
void token__forget_keys(struct token_keys *keys);
/* Bytes, or false when it is no base64url without padding (RFC 7515, 2). `out` has room for len * 3 / 4. */
bool token__decode(const char *text, size_t len, uint8_t *out, size_t *out_len);

/* ---- throttle.c: failed logins, in a table of fixed size ---- */

#define THROTTLE_SETS 1024
#define THROTTLE_WAYS 4
#define THROTTLE_ADDRESS_FACTOR 10 /* an address may fail so many times as often as one identity from it */

struct throttle {
	uint8_t key[16]; /* so that nobody can choose what collides */
	uint32_t limit; /* failures a minute, of one identity from one address */
	struct {
		uint64_t tag;
		int64_t seen; /* seconds */
		uint32_t level; /* failures x 60, draining */
	} slots[THROTTLE_SETS][THROTTLE_WAYS];
};

bool throttle__init(struct throttle *throttle, uint32_t limit);
/* `now` in seconds of a clock that is never set; `from` is NULL where a certificate has proved who it is. */
bool throttle__blocked(struct throttle *throttle, const struct moment *from, const char *id, int64_t now);
void throttle__failed(struct throttle *throttle, const struct moment *from, const char *id, int64_t now);
void throttle__succeeded(struct throttle *throttle, const struct moment *from, const char *id);

/* ---- audit.c: one line of JSON for each refusal ---- */

#define AUDIT_LINE 900 /* bytes; Mosquitto cuts lines at 1000 */

enum audit_kind { AUDIT_CONNECT, AUDIT_ASK, AUDIT_DELIVER, AUDIT_KINDS };

#define AUDIT_SETS 1024
#define AUDIT_WAYS 4
#define AUDIT_SENDER 4 /* one sender gets so much of a kind's lines, as a divisor */
#define AUDIT_NETWORK 2 /* and all senders of one network so much */

struct audit {
	uint8_t key[16]; /* so that nobody can choose what collides */
	uint32_t rate; /* lines a second, for each kind */
	struct {
		int64_t second;
		uint32_t used;
		uint64_t suppressed;
	} buckets[AUDIT_KINDS];
	struct {
		uint64_t tag;
		uint32_t second, used; /* of the second in which it last wrote */
	} senders[AUDIT_SETS][AUDIT_WAYS];
};

/* What a line says; NULL and length 0 are left out. Client text may be any bytes. */
struct audit_event {
	const char *event, *action;
	const char *device, *client_id, *address, *topic;
	enum reason reason;
	const char *rule;
	size_t rule_len;
};

const char *reason__name(enum reason reason);
bool audit__init(struct audit *audit, uint32_t rate);
/* Whether this line may be written now; how many of its kind were held back is in *suppressed, and forgotten. `now` in
 * seconds of a clock that is never set. */
bool audit__may(struct audit *audit, enum audit_kind kind, const struct audit_event *event, int64_t now,
		uint64_t *suppressed);
/* Returns the length of the line, which is NUL-terminated as well. */
size_t audit__format(const struct audit_event *event, uint64_t suppressed, char out[AUDIT_LINE]);
/* Writes bytes as the inside of a JSON string in ASCII; what does not fit into `room` becomes an ellipsis. */
size_t audit__escape(const char *text, size_t len, char *out, size_t room);

/* ---- session.c: who is connected, and what was read about them ---- */

enum method {
	METHOD_CERTIFICATE = FLAG_CERTIFICATE, METHOD_PASSWORD = FLAG_PASSWORD, METHOD_PSK = FLAG_PSK,
	METHOD_TOKEN = FLAG_TOKEN
};

struct device {
	char id[BEDNET_ID_MAX + 1];
	uint8_t flags;
	bool stale; /* to be read again before it is believed */
	bool queued; /* its sessions are to be looked at on the next tick */
	enum reason state; /* REASON_NONE, UNKNOWN_DEVICE, REVOKED, STORE, INTERNAL */
	int64_t until;
	uint64_t generation;
	struct grants *grants;
	struct session *sessions;
	struct token *left; /* of its last session, when that is over: for its will and its queue */
	size_t left_size; /* bytes that were counted for it */
	struct device *next, *next_queued, *left_next, *left_back;
};

struct session {
	const void *client; /* compared, never followed: it may be gone */
	struct device *device;
	enum method method;
	bool dead; /* kicked; nothing is granted to it while it goes */
	bool pending; /* a PSK was asked for; no word from the client yet */
	enum reason broken; /* it must end for this, whatever the store says */
	struct token *token; /* or NULL; its own */
	struct challenge *challenge; /* of a re-authentication, or NULL; its own */
	uint8_t serial[BEDNET_SERIAL_MAX];
	size_t serial_len;
	int64_t not_after;
	int64_t end; /* first second without access */
	size_t heap_at; /* 1 + place in the heap; 0 when it has no end */
	uint64_t generation; /* when its serial number was last looked up */
	enum reason serial_state;
	struct moment from; /* its address */
	struct session *next, *of_device, *of_device_back, *all, *all_back, *waits, *waits_back;
};

/* Somebody with a token has been asked to prove that the token's key is its own. */
struct challenge {
	const void *client;
	struct token *token;
	EVP_PKEY *key;
	uint8_t nonce[TOKEN_NONCE];
	bool has_certificate;
	struct certificate certificate;
	struct moment from;
	/* of a client that is not let in yet */
	unsigned int number; /* its user name until then, see challenge__username */
	int64_t deadline; /* seconds of a clock that is never set */
	struct challenge *next;
};

#define SESSIONS_LEFT (16u << 20) /* bytes of tokens that are kept of sessions that are over */
#define SESSIONS_PENDING 1024
#define SESSIONS_PENDING_SAME 64 /* from one address */

struct sessions {
	struct store *store;
	const char *audience; /* of this gateway, or NULL */
	uint64_t secret; /* of the table of devices */
	struct device **devices;
	size_t device_slots, device_count;
	struct session **table;
	size_t slots, count;
	struct session *all;
	struct session *sweep; /* the next one that a sweep looks at */
	struct device *queue;
	struct session **heap; /* by end */
	size_t heap_count, heap_room;
	struct session *oldest, *newest; /* pending */
	size_t pending;
	struct device *left_oldest, *left_newest;
	size_t left_size; /* bytes */
	uint64_t generation, token_generation;
};

/* False when there are no random bytes. */
bool sessions__init(struct sessions *sessions, struct store *store);
void sessions__free(struct sessions *sessions);
/* The session of a client, when it is this device's. */
struct session *sessions__find(struct sessions *sessions, const void *client, const char *id);
/* A new session, in place of what was known under this client; NULL without memory. Nothing has been checked yet. */
struct session *sessions__add(struct sessions *sessions, const void *client, const char *id, enum method method,
		const struct certificate *certificate, const struct moment *from);
void sessions__remove(struct sessions *sessions, const void *client);
/* The same for one that was let in: its token is kept for its will and its queue. */
void sessions__leave(struct sessions *sessions, const void *client);
/* The session of a client, whoever's it is. */
struct session *sessions__of(struct sessions *sessions, const void *client);
/* Gives a session a token that was checked; it is the session's from then on. */
void sessions__authorise(struct session *session, struct token *token);
/* Has it closed on the next tick. */
void sessions__break(struct sessions *sessions, struct session *session, enum reason why);
/* The token of a device's last session, or NULL; `any`: of a session that is not over as well. Not to be kept. */
struct token *sessions__left(struct sessions *sessions, const char *id, bool any);
/* Brings a token up to date with the store; REASON_NONE does not say that it has not ended. */
enum reason sessions__token(struct sessions *sessions, struct token *token, const char *id, int64_t now);
const struct grants *session__grants(const struct session *session);
/* Keeps the end of a session's device, which need not have been read; false without memory. */
bool sessions__expect(struct sessions *sessions, struct session *session, int64_t until);
void sessions__confirm(struct sessions *sessions, struct session *session);
void sessions__changed(struct sessions *sessions, const char *id, size_t len);
void sessions__issuers_changed(struct sessions *sessions);
void sessions__all_changed(struct sessions *sessions);
/* Brings a session up to date with the store and says whether it may go on. */
enum reason sessions__check(struct sessions *sessions, struct session *session, int64_t now);
/* One that must end, or NULL; looks at no more than one candidate. *more: there is more to look at. */
struct session *sessions__next_due(struct sessions *sessions, int64_t now, enum reason *why, bool *more);
/* Reads a device afresh, into a struct that is the caller's and has an id; device__clear afterwards.
 * False when it could not be read this time. */
bool device__read(struct store *store, struct device *device);
void device__clear(struct device *device);

/* ---- auth.c: MQTT 5 enhanced authentication: what clients send, and what they were asked ---- */

#define CHALLENGES 256 /* of all clients that are not let in yet */
#define CHALLENGES_SAME 4 /* of one device: a stolen token pushes out no other's */
#define CHALLENGE_SECONDS 10
#define CHALLENGE_USERNAME 32 /* bytes */

/* The first message of OAUTHBEARER (RFC 7628, 3.1); `authzid` is empty where there is none. */
bool auth__bearer(struct slice data, struct slice *authzid, struct slice *token);
/* The first message of `ace` (RFC 9431, 2.2.4.2); *rest is what comes behind the token. */
bool auth__ace(struct slice data, struct slice *token, struct slice *rest);

/* What a client calls itself in the meantime: no device's name, so that nothing is granted to it, and one that no other
 * client has, so that it alone can be sent away. */
void challenge__username(const struct challenge *challenge, char out[CHALLENGE_USERNAME]);
/* A new one with a fresh nonce. It takes the token and the key, also when it returns NULL, for want of memory or random
 * numbers. `certificate` may be NULL. */
struct challenge *challenge__new(struct token *token, EVP_PKEY *key, const void *client,
		const struct certificate *certificate, const struct moment *from);
void challenge__free(struct challenge *challenge);
/* Whether the answer is the right one: the client's nonce, and a signature over both (RFC 9431, 2.2.4.2.2). */
bool challenge__answered(const struct challenge *challenge, struct slice data);

struct challenges {
	struct challenge *first; /* the newest */
	size_t count;
	unsigned int number;
};

/* Keeps it; `now` in seconds of a clock that is never set. Where too many are open, the oldest of the same device, or of
 * all, becomes due; false when there is no room for all that, then it is the caller's to free. */
bool challenges__add(struct challenges *challenges, struct challenge *challenge, int64_t now);
/* Takes a client's out, for the caller to free; NULL when there is none. */
struct challenge *challenges__take(struct challenges *challenges, const void *client);
/* One whose time is over, or NULL. It stays. */
struct challenge *challenges__due(struct challenges *challenges, int64_t now);

#endif
