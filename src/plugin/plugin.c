/* SPDX-License-Identifier: Apache-2.0
 *
 * bednet_plugin: the broker's questions, and where they are answered. docs/plugin.md tells the whole.
 *
 * No callback ever answers DEFER: an acl_file, a password_file or allow_anonymous would then decide.
 */
#include "bednet.h"
#include "broker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <arpa/inet.h>

#include <openssl/crypto.h>
#include <openssl/rand.h>

#define EXPORT __attribute__((visibility("default")))

#define STORE_USUAL "/var/lib/bednet/store"
#define AUDIT_RATE_USUAL 50 /* lines a second, for each kind */
#define AUDIT_RATE_MAX 1000
#define LOGIN_FAILURES_USUAL 10 /* a minute */
#define LOGIN_FAILURES_MAX 1000
#define TICK_MS 50 /* Mosquitto 2.1 asks when to come again; 2.0 comes at least every 100 ms */
#define TICK_BUDGET_NS 2000000 /* what one tick may spend on changes; the rest waits for the next */
#define COMPLAIN_SECONDS 60 /* between two complaints about a store that cannot be read */
#define AUDIENCE_MAX 255 /* bytes */

struct plugin {
	mosquitto_plugin_id_t *identifier;
	struct store store;
	struct sessions sessions;
	struct change_sink sink;
	struct throttle throttle;
	struct token_keys keys;
	struct challenges challenges;
	char audience[AUDIENCE_MAX + 1]; /* of this gateway, or "" */
	struct audit audit;
	uint8_t secret[SECRET_KEY_LEN]; /* of this start: keys of those who have none come of it */
	MOSQ_FUNC_generic_callback tick; /* the one that is registered now */
	int64_t complained; /* seconds of the monotonic clock */
	bool ticked; /* the broker has ticked at least once */
	bool reloading; /* from RELOAD until the next tick */
	bool kicking;
};

/* LMDB must not open an environment twice in one process, and one .so that is loaded for two listeners is initialised
 * twice. This is the plugin's only global. */
static bool loaded;


/* Not time(), which lags by some milliseconds: an end is kept at its second. */
static int64_t wall(void)
{
	struct timespec now;

	return clock_gettime(CLOCK_REALTIME, &now) == 0 ? (int64_t)now.tv_sec : (int64_t)time(NULL);
}


static int64_t monotonic_ns(void)
{
	struct timespec now;

	return clock_gettime(CLOCK_MONOTONIC, &now) == 0 ? (int64_t)now.tv_sec * 1000000000 + now.tv_nsec : 0;
}


static int64_t monotonic(void)
{
	return monotonic_ns() / 1000000000;
}


/* ---- what is written ---- */

static void write_event(const struct audit_event *event, uint64_t suppressed)
{
	char line[AUDIT_LINE];

	audit__format(event, suppressed, line);
	mosquitto_log_printf(MOSQ_LOG_NOTICE, "%s", line);
}


/* What a client calls itself is written down, but for a token that came in the wrong place. */
static const char *printable(const char *name)
{
	if(name && (strncmp(name, "eyJ", 3) == 0 || strncmp(name, "aceeyJ", 6) == 0)){ /* RFC 9431, 6.1 */
		return "(a token)";
	}
	return name;
}


static void refused(struct plugin *plugin, enum audit_kind kind, const struct mosquitto *client, const char *action,
		const char *device, const char *topic, enum reason reason, const struct grant *grant)
{
	struct audit_event event = {
		.event = "refused", .action = action, .device = printable(device),
		.client_id = printable(mosquitto_client_id(client)),
		.address = mosquitto_client_address(client), .topic = topic, .reason = reason,
		.rule = grant ? grant->id : NULL, .rule_len = grant ? grant->id_len : 0,
	};
	uint64_t suppressed;

	if(audit__may(&plugin->audit, kind, &event, monotonic(), &suppressed)){
		write_event(&event, suppressed);
	}
}


static void look_at_changes(struct plugin *plugin)
{
	int64_t now;

	if(!store__moved(&plugin->store) || store__refresh(&plugin->store, &plugin->sink)){
		return;
	}
	now = monotonic();
	if(plugin->complained == 0 || now - plugin->complained >= COMPLAIN_SECONDS){
		plugin->complained = now;
		mosquitto_log_printf(MOSQ_LOG_ERR, "bednet: the store cannot be read; what was read before stands, and nothing "
				"new is granted.");
	}
}


static void on_device_changed(void *context, const char *id, size_t len)
{
	struct plugin *plugin = context;

	sessions__changed(&plugin->sessions, id, len);
}


static void on_issuers_changed(void *context)
{
	struct plugin *plugin = context;

	sessions__issuers_changed(&plugin->sessions);
}


static void on_all_changed(void *context)
{
	struct plugin *plugin = context;

	sessions__all_changed(&plugin->sessions);
}


/* ---- who is it? ---- */

/* What is wrong with a device itself; `record` is filled in for REASON_NONE and REASON_REVOKED, and good until
 * store__end. To be called between store__begin and store__end. */
static enum reason device_reason(struct plugin *plugin, const char *id, int64_t now, struct device_record *record)
{
	enum reason reason;

	if(id == NULL || !record__id_ok(id, strnlen(id, BEDNET_ID_MAX + 1))){
		return REASON_UNKNOWN_DEVICE;
	}
	reason = store__device(&plugin->store, id, strlen(id), record);
	if(reason != REASON_NONE){
		return reason;
	}
	if(record->flags & FLAG_REVOKED){
		return REASON_REVOKED;
	}
	return now < record->until ? REASON_NONE : REASON_UNTIL;
}


/* What is wrong with a certificate itself. */
static enum reason certificate_reason(struct plugin *plugin, const struct certificate *certificate, int64_t now)
{
	enum reason reason;

	if(!store__begin(&plugin->store)){
		return REASON_STORE;
	}
	reason = store__serial(&plugin->store, certificate->serial, certificate->serial_len);
	store__end(&plugin->store);
	if(reason == REASON_NONE && (now < certificate->not_before || now > certificate->not_after)){
		reason = REASON_CERTIFICATE_TIME;
	}
	return reason;
}


static enum reason by_certificate(struct plugin *plugin, const struct certificate *certificate, const char *username,
		int64_t now)
{
	struct device_record record;
	enum reason reason;

	if(!store__begin(&plugin->store)){
		return REASON_STORE;
	}
	reason = device_reason(plugin, certificate->id, now, &record);
	store__end(&plugin->store);
	if(reason == REASON_NONE){
		reason = certificate_reason(plugin, certificate, now);
	}
	if(reason == REASON_NONE && !(record.flags & FLAG_CERTIFICATE)){
		reason = REASON_METHOD;
	}
	if(reason == REASON_NONE && username && strcmp(username, certificate->id) != 0){
		reason = REASON_USERNAME;
	}
	return reason;
}


static enum reason by_password(struct plugin *plugin, const char *username, const char *password,
		const struct moment *from, int64_t now)
{
	struct device_record record = {0};
	enum reason reason;
	bool right;

	if(username == NULL){
		return REASON_UNKNOWN_DEVICE;
	}
	password = password ? password : ""; /* the broker makes no difference */
	if(throttle__blocked(&plugin->throttle, from, username, monotonic())){
		return REASON_THROTTLED;
	}
	if(!store__begin(&plugin->store)){
		return REASON_STORE;
	}
	reason = device_reason(plugin, username, now, &record);
	/* The same work, whatever is wrong already. */
	right = secret__password(reason == REASON_NONE || reason == REASON_UNTIL ? &record : NULL, password);
	if(reason == REASON_NONE && !(record.flags & FLAG_PASSWORD)){
		reason = REASON_METHOD;
	}else if((reason == REASON_NONE || reason == REASON_UNTIL) && !right){
		reason = REASON_PASSWORD;
	}
	store__end(&plugin->store);
	OPENSSL_cleanse(&record, sizeof(record));
	if(right){
		throttle__succeeded(&plugin->throttle, from, username);
	}else{
		throttle__failed(&plugin->throttle, from, username, monotonic());
	}
	return reason;
}


/* Who asks to come in, and what TLS says of it. */
struct guest {
	struct mosquitto *client;
	const char *client_id, *username;
	struct moment from;
	X509 *x509; /* or NULL */
	bool named; /* its certificate names a device */
	struct certificate certificate;
	int64_t now;
};


static struct guest welcome(struct mosquitto *client, const char *username)
{
	struct guest guest = {
		.client = client, .client_id = mosquitto_client_id(client), .username = username, .now = wall(),
	};

	decide__address(mosquitto_client_address(client), &guest.from);
	guest.x509 = mosquitto_client_certificate(client);
	guest.named = guest.x509 && cert__read(guest.x509, &guest.certificate);
	return guest;
}


/* The device that a guest says it is, before anything is proven; NULL when it says nothing. */
static const char *claimed(const struct guest *guest)
{
	if(guest->x509){
		return guest->named ? guest->certificate.id : NULL;
	}
	return guest->username ? guest->username : guest->client_id;
}


/* Where its failures count. A stranger at the same address can say any name, but has no certificate of it. */
static const struct moment *counted_at(const struct guest *guest)
{
	return guest->named ? NULL : &guest->from;
}


static bool is_token_reason(enum reason reason)
{
	return reason >= REASON_TOKEN_MALFORMED && reason <= REASON_TOKEN_PROOF;
}


/* A token, and a certificate too where one is shown: then both must hold, and be of one device; so must they where a session
 * is given a new one. `proves`: the method is `ace`. The token is the caller's to free when it was good, else *out is NULL. */
static enum reason by_token(struct plugin *plugin, const struct guest *guest, const struct session *session,
		const char *text, size_t len, bool proves, struct token **out)
{
	struct token_question question = {
		.store = &plugin->store, .keys = &plugin->keys, .audience = plugin->sessions.audience, .proves = proves,
		.now = guest->now,
	};
	const char *name = claimed(guest);
	uint8_t thumbprint[HASH_LEN];
	struct device_record record;
	struct token *token;
	enum reason reason;

	*out = NULL;
	if(name == NULL){
		return REASON_UNKNOWN_DEVICE;
	}
	/* First: one that is revoked proves nothing, and must not count against its device. */
	if(guest->named){
		reason = certificate_reason(plugin, &guest->certificate, guest->now);
		if(reason != REASON_NONE){
			return reason;
		}
	}
	/* A session has proved who it is, and ends when this fails: nobody else's failures hold up its renewal. */
	if(!session && throttle__blocked(&plugin->throttle, counted_at(guest), name, monotonic())){
		return REASON_THROTTLED;
	}
	token = token__read(text, len, &reason);
	if(token && guest->x509){
		if(!cert__thumbprint(guest->x509, thumbprint)){
			reason = REASON_INTERNAL;
		}
		question.thumbprint = thumbprint;
	}
	if(reason == REASON_NONE && !store__begin(&plugin->store)){
		reason = REASON_STORE;
	}else if(reason == REASON_NONE){
		reason = token__check(token, &question);
		if(reason == REASON_NONE && !token->made){
			reason = device_reason(plugin, token->id, guest->now, &record);
			if(reason == REASON_NONE && !(record.flags & FLAG_TOKEN)){
				reason = REASON_METHOD;
			}
		}
		store__end(&plugin->store);
	}
	if(reason == REASON_NONE && guest->x509 && strcmp(token->id, guest->certificate.id) != 0){
		reason = REASON_TOKEN_BINDING;
	}
	if(reason == REASON_NONE && session && strcmp(session->device->id, token->id) != 0){
		reason = REASON_TOKEN_BINDING;
	}
	if(reason == REASON_NONE && guest->username && strcmp(guest->username, token->id) != 0){
		reason = REASON_USERNAME;
	}
	if(reason == REASON_NONE && (guest->client_id == NULL || strcmp(guest->client_id, token->id) != 0)){
		reason = REASON_CLIENT_ID;
	}
	if(is_token_reason(reason)){
		throttle__failed(&plugin->throttle, counted_at(guest), name, monotonic());
	}
	if(reason != REASON_NONE){
		token__free(token);
		return reason;
	}
	if(!proves){
		throttle__succeeded(&plugin->throttle, counted_at(guest), name);
	}
	token->generation = plugin->sessions.token_generation;
	*out = token;
	return REASON_NONE;
}


/* Makes the session of somebody who has proven who it is. The token may be NULL; it is taken in any case. */
static enum reason admit(struct plugin *plugin, struct mosquitto *client, const char *id, enum method method,
		const struct certificate *certificate, struct token *token, const struct moment *from, int64_t now)
{
	struct session *session = sessions__add(&plugin->sessions, client, id, method, certificate, from);
	enum reason reason;

	if(session == NULL){
		token__free(token);
		return REASON_INTERNAL;
	}
	sessions__authorise(session, token);
	reason = sessions__check(&plugin->sessions, session, now);
	if(reason == REASON_NONE && method != METHOD_PASSWORD && mosquitto_set_username(client, id) != MOSQ_ERR_SUCCESS){
		reason = REASON_INTERNAL;
	}
	if(reason != REASON_NONE){
		sessions__remove(&plugin->sessions, client);
	}
	return reason;
}


/* Situation                                                    Answer
 * a certificate, or a user name and password, as in the store  SUCCESS
 * a token as the password, with its certificate if it has one  SUCCESS
 * a session that was let in before (the broker asks again for all of them, online and offline, after SIGHUP)  SUCCESS
 * anything else                                                AUTH
 */
static int on_basic_auth(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_basic_auth *question = event_data;
	struct plugin *plugin = userdata;
	struct mosquitto *client = question->client;
	const char *client_id = mosquitto_client_id(client), *id = question->username;
	const char *password = question->password ? question->password : "";
	const size_t len = strlen(password);
	struct guest guest;
	struct token *token = NULL;
	enum reason reason;
	enum method method = METHOD_PASSWORD;

	(void)event;
	look_at_changes(plugin);
	if(plugin->reloading && id && client_id && strcmp(id, client_id) == 0
			&& (sessions__find(&plugin->sessions, client, id)
			|| mosquitto_client_protocol(client) != mp_websockets)){
		/* Not a new connection: none is served between RELOAD and the tick that follows it, except for one over
		 * WebSockets in 2.0. Who must go is kicked on a tick, and an offline session can do nothing by itself. */
		return MOSQ_ERR_SUCCESS;
	}
	guest = welcome(client, id);
	if(!plugin->ticked){
		reason = REASON_INTERNAL; /* revocation would not be kept; see on_tick */
	}else if(token__is(password, len)){
		method = METHOD_TOKEN;
		reason = by_token(plugin, &guest, NULL, password, len, false, &token);
		id = reason == REASON_NONE ? token->id : claimed(&guest);
	}else if(guest.x509){
		method = METHOD_CERTIFICATE;
		id = claimed(&guest);
		reason = guest.named ? by_certificate(plugin, &guest.certificate, guest.username, guest.now)
				: REASON_UNKNOWN_DEVICE;
	}else{
		reason = by_password(plugin, id, password, &guest.from, guest.now);
	}
	if(reason == REASON_NONE && (client_id == NULL || strcmp(client_id, id) != 0)){
		reason = REASON_CLIENT_ID;
	}
	if(reason == REASON_NONE){
		/* The client's id outlives the token. */
		reason = admit(plugin, client, client_id, method, guest.named ? &guest.certificate : NULL, token, &guest.from,
				guest.now);
		id = client_id;
	}
	X509_free(guest.x509);
	if(reason != REASON_NONE){
		refused(plugin, AUDIT_CONNECT, client, "connect", id, NULL, reason, NULL);
		sessions__remove(&plugin->sessions, client);
		return MOSQ_ERR_AUTH;
	}
	return MOSQ_ERR_SUCCESS;
}


/* ---- who is it? MQTT 5 enhanced authentication ---- */

/* Lets somebody in by a token, or gives its session a new one. */
static enum reason enter(struct plugin *plugin, struct mosquitto *client, struct session *session,
		const struct certificate *certificate, struct token *token, const struct moment *from, int64_t now)
{
	if(session == NULL){
		return admit(plugin, client, mosquitto_client_id(client), METHOD_TOKEN, certificate, token, from, now);
	}
	sessions__authorise(session, token);
	return sessions__check(&plugin->sessions, session, now);
}


/* The key that has to sign: the token's, or that of the certificate to which the token is bound. */
static EVP_PKEY *key_to_prove(const struct token *token, const struct guest *guest)
{
	EVP_PKEY *key = token->proof;

	if(key){
		EVP_PKEY_up_ref(key);
		return key;
	}
	return guest->x509 ? X509_get_pubkey(guest->x509) : NULL;
}


/* Asks for a proof that the token's key is the client's; takes the token. REASON_NONE when it was asked. */
static enum reason challenge(struct plugin *plugin, const struct guest *guest, struct session *session, struct token *token,
		struct mosquitto_evt_extended_auth *question)
{
	EVP_PKEY *key = key_to_prove(token, guest);
	struct challenge *made;
	char name[CHALLENGE_USERNAME];

	if(key == NULL){
		token__free(token);
		return REASON_TOKEN_BINDING;
	}
	made = challenge__new(token, key, guest->client, guest->named ? &guest->certificate : NULL, &guest->from);
	question->data_out = made ? malloc(TOKEN_NONCE) : NULL; /* which the broker gives back by free() */
	if(question->data_out == NULL){
		challenge__free(made);
		return REASON_INTERNAL;
	}
	question->data_out_len = TOKEN_NONCE;
	memcpy(question->data_out, made->nonce, TOKEN_NONCE);
	if(session){
		challenge__free(session->challenge);
		session->challenge = made;
		return REASON_NONE;
	}
	/* Until it has answered, it goes by a name that no device has: the broker would send its will in the name that it
	 * has given itself. */
	challenge__free(challenges__take(&plugin->challenges, guest->client));
	if(!challenges__add(&plugin->challenges, made, monotonic())){
		challenge__free(made);
		return REASON_THROTTLED;
	}
	challenge__username(made, name);
	if(mosquitto_set_username(guest->client, name) != MOSQ_ERR_SUCCESS){
		challenge__free(challenges__take(&plugin->challenges, guest->client));
		return REASON_INTERNAL;
	}
	return REASON_NONE;
}


/* Situation                                                     Answer
 * OAUTHBEARER with a good token; of the same device, where it comes from a session (re-authentication)  SUCCESS
 * ace with a good token, likewise                               AUTH_CONTINUE and a nonce
 * another method                                                NOT_SUPPORTED
 * anything else                                                 AUTH
 */
static int on_auth_start(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_extended_auth *question = event_data;
	struct plugin *plugin = userdata;
	struct mosquitto *client = question->client;
	const char *method = question->auth_method ? question->auth_method : "";
	const bool proves = strcmp(method, "ace") == 0;
	struct slice data = {question->data_in, question->data_in ? question->data_in_len : 0}, text, name = {NULL, 0};
	struct session *session;
	struct guest guest;
	struct token *token = NULL;
	enum reason reason = REASON_NONE;

	(void)event;
	look_at_changes(plugin);
	session = sessions__of(&plugin->sessions, client);
	if(!proves && strcmp(method, "OAUTHBEARER") != 0){
		refused(plugin, AUDIT_CONNECT, client, "connect", mosquitto_client_username(client), NULL, REASON_METHOD, NULL);
		return MOSQ_ERR_NOT_SUPPORTED;
	}
	guest = welcome(client, mosquitto_client_username(client));
	if(!plugin->ticked){
		reason = REASON_INTERNAL;
	}else if(session && session->method != METHOD_TOKEN){
		reason = REASON_METHOD; /* of a PSK listener: the key has said who it is */
	}else if(proves){
		if(!auth__ace(data, &text, &name)){
			reason = REASON_TOKEN_MALFORMED;
		}else if(name.len > 0){
			reason = REASON_TOKEN_PROOF; /* over what TLS exports, which the broker does not show to plugins */
		}
	}else if(!auth__bearer(data, &name, &text)){
		reason = REASON_TOKEN_MALFORMED;
	}
	if(is_token_reason(reason) && claimed(&guest)
			&& (!guest.named || certificate_reason(plugin, &guest.certificate, guest.now) == REASON_NONE)){
		throttle__failed(&plugin->throttle, counted_at(&guest), claimed(&guest), monotonic());
	}
	if(reason == REASON_NONE){
		reason = by_token(plugin, &guest, session, (const char *)text.at, text.len, proves, &token);
	}
	if(reason == REASON_NONE && name.len > 0 && (name.len != strlen(token->id) || memcmp(name.at, token->id, name.len) != 0)){
		reason = REASON_USERNAME;
		token__free(token);
	}else if(reason == REASON_NONE && proves){
		reason = challenge(plugin, &guest, session, token, question);
	}else if(reason == REASON_NONE){
		reason = enter(plugin, client, session, guest.named ? &guest.certificate : NULL, token, &guest.from, guest.now);
	}
	X509_free(guest.x509);
	if(reason != REASON_NONE){
		refused(plugin, AUDIT_CONNECT, client, "connect", session ? session->device->id : claimed(&guest), NULL, reason, NULL);
		return MOSQ_ERR_AUTH;
	}
	return proves ? MOSQ_ERR_AUTH_CONTINUE : MOSQ_ERR_SUCCESS;
}


/* See counted_at. */
static const struct moment *asked_at(const struct challenge *challenge)
{
	return challenge->has_certificate ? NULL : &challenge->from;
}


/* Situation                                                     Answer
 * the right answer to the question that was put to this client  SUCCESS
 * a session to which none was put                               AUTH_CONTINUE, and it is closed on the next tick
 * anything else                                                 AUTH
 */
static int on_auth_continue(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_extended_auth *question = event_data;
	struct plugin *plugin = userdata;
	struct mosquitto *client = question->client;
	struct slice data = {question->data_in, question->data_in ? question->data_in_len : 0};
	struct session *session;
	struct challenge *asked;
	struct token *token;
	enum reason reason = REASON_TOKEN_PROOF;
	char id[BEDNET_ID_MAX + 1] = "";

	(void)event;
	look_at_changes(plugin);
	session = sessions__of(&plugin->sessions, client);
	if(session && session->challenge == NULL){
		/* An empty AUTH packet: the broker takes it for an answer, whatever the session's state. Were it refused, it would
		 * free the id of a client that it still finds by it; were it granted, it would put itself in its own place. */
		sessions__break(&plugin->sessions, session, REASON_TOKEN_PROOF);
		return MOSQ_ERR_AUTH_CONTINUE;
	}
	if(session){
		asked = session->challenge;
		session->challenge = NULL;
	}else{
		asked = challenges__take(&plugin->challenges, client);
	}
	if(asked){
		memcpy(id, asked->token->id, sizeof(id));
		if((session || asked->deadline > 0) && challenge__answered(asked, data)){
			token = asked->token;
			asked->token = NULL;
			token->stale = true; /* the store may have changed since */
			throttle__succeeded(&plugin->throttle, asked_at(asked), id);
			reason = enter(plugin, client, session, asked->has_certificate ? &asked->certificate : NULL, token, &asked->from,
					wall());
		}else{
			throttle__failed(&plugin->throttle, asked_at(asked), id, monotonic());
		}
		challenge__free(asked);
	}
	if(reason != REASON_NONE){
		refused(plugin, AUDIT_CONNECT, client, "connect", *id ? id : NULL, NULL, reason, NULL);
		return MOSQ_ERR_AUTH;
	}
	return MOSQ_ERR_SUCCESS;
}


/* A question that was never answered counts as a wrong answer. */
static void forget_challenge(struct plugin *plugin, const void *client)
{
	struct challenge *asked = challenges__take(&plugin->challenges, client);

	if(asked){
		throttle__failed(&plugin->throttle, asked_at(asked), asked->token->id, monotonic());
		challenge__free(asked);
	}
}


/* Those that do not answer go: the broker would let them stay as long as they like. */
static void end_challenges(struct plugin *plugin)
{
	struct challenge *asked;

	while((asked = challenges__due(&plugin->challenges, monotonic()))){
		struct audit_event event = {
			.event = "refused", .action = "connect", .device = asked->token->id, .client_id = asked->token->id,
			.reason = REASON_TOKEN_PROOF,
		};
		const void *client = asked->client;
		char name[CHALLENGE_USERNAME];
		uint64_t suppressed;

		if(audit__may(&plugin->audit, AUDIT_CONNECT, &event, monotonic(), &suppressed)){
			write_event(&event, suppressed);
		}
		challenge__username(asked, name);
		plugin->kicking = true;
		mosquitto_kick_client_by_username(name, false); /* DISCONNECT takes it out */
		plugin->kicking = false;
		forget_challenge(plugin, client);
	}
}


static void write_key(const struct mosquitto_evt_psk_key *question, const uint8_t *key, size_t len)
{
	static const char digits[] = "0123456789abcdef";
	size_t i;

	for(i = 0; i < len; i++){
		question->key[2 * i] = digits[key[i] >> 4];
		question->key[2 * i + 1] = digits[key[i] & 15];
	}
	question->key[2 * len] = '\0';
}


/* Situation                                               Answer
 * a device of the store with a key, not revoked or ended  SUCCESS and the key, in hexadecimal
 * anything else                                           SUCCESS and a key that nobody has
 * there is no room for a key, or none can be made         AUTH
 *
 * A name without a key then fails as one with a wrong key does, and strangers do not learn which devices there are
 * (RFC 4279, 2; RFC 8446, 4.2.11). No session is made for it. */
static int on_psk_key(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_psk_key *question = event_data;
	struct plugin *plugin = userdata;
	struct device_record record;
	struct session *session;
	struct moment from;
	enum reason reason = REASON_STORE;
	uint8_t nobodys[SECRET_KEY_LEN];
	const size_t room = question->max_key_len < 1 ? 0 : ((size_t)question->max_key_len - 1) / 2;
	int64_t now = wall();
	bool known = false;

	(void)event;
	look_at_changes(plugin);
	if(room < sizeof(nobodys) || !secret__nobodys_key(plugin->secret, question->identity, nobodys)){
		refused(plugin, AUDIT_CONNECT, question->client, "connect", question->identity, NULL, REASON_INTERNAL, NULL);
		return MOSQ_ERR_AUTH;
	}
	if(!plugin->ticked){
		reason = REASON_INTERNAL;
	}else if(store__begin(&plugin->store)){
		reason = device_reason(plugin, question->identity, now, &record);
		if(reason == REASON_NONE && !(record.flags & FLAG_PSK)){
			reason = REASON_METHOD;
		}
		if(reason == REASON_NONE && record.psk.len > room){
			reason = REASON_INTERNAL;
		}
		if(reason == REASON_NONE){
			decide__address(mosquitto_client_address(question->client), &from);
			session = sessions__add(&plugin->sessions, question->client, question->identity, METHOD_PSK, NULL, &from);
			/* What it may do is read when it has proved that it has the key; its end is kept from now on. */
			reason = session && sessions__expect(&plugin->sessions, session, record.until) ? REASON_NONE : REASON_INTERNAL;
		}
		if(reason == REASON_NONE){
			write_key(question, record.psk.at, record.psk.len);
			known = true;
		}
		store__end(&plugin->store);
	}
	if(!known){
		sessions__remove(&plugin->sessions, question->client);
		write_key(question, nobodys, sizeof(nobodys));
		refused(plugin, AUDIT_CONNECT, question->client, "connect", question->identity, NULL, reason, NULL);
	}
	return MOSQ_ERR_SUCCESS;
}


/* ---- what may it do? ---- */

/* A client without a session is offline, or gone and its will is left: its device is read afresh. Of an offline session
 * the broker still shows the address of its last connection, which says nothing about now; a will was sent from there.
 * A token that let the client in goes on to limit it; where it is not known any more, a device that needs one has no rights.
 *
 * With check_retain_source the broker asks for a client that never was, made up for the question, whether the publisher of
 * a retained message may still do so. When, from where and with what token it did was looked at then, and is not known any
 * more: what counts is that it has not lost the right. A client with a will has a protocol version, this one has none. */
static struct decision decide_without_session(struct plugin *plugin, struct mosquitto *client, const char *id,
		enum access access, const char *topic, struct moment *moment, char rule[UINT8_MAX], struct grant *copy)
{
	struct decision decision = {REASON_UNKNOWN_DEVICE, NULL};
	struct device device = {.until = BEDNET_NEVER};
	const struct grants *grants = NULL;
	struct token *token;
	size_t len = strnlen(id, BEDNET_ID_MAX + 1);

	if(!record__id_ok(id, len)){
		return decision;
	}
	memcpy(device.id, id, len + 1);
	if(access == ACCESS_PUBLISH && !decide__address(mosquitto_client_address(client), moment)
			&& mosquitto_client_protocol_version(client) == 0){
		moment->has_time = false;
		moment->generous = true;
	}
	token = sessions__left(&plugin->sessions, id, moment->generous);
	if(token){
		decision.reason = sessions__token(&plugin->sessions, token, id, moment->now);
		if(decision.reason == REASON_NONE && moment->now >= token->end){
			decision.reason = REASON_TOKEN_EXPIRED;
		}
		grants = token->grants;
	}
	if(token == NULL || (moment->generous && !token->made)){
		token = NULL;
		decision.reason = REASON_NONE;
	}
	if(decision.reason == REASON_NONE && grants == NULL){
		device__read(&plugin->store, &device);
		grants = device.grants;
		decision.reason = device.state;
		if(decision.reason == REASON_NONE && moment->now >= device.until){
			decision.reason = REASON_UNTIL;
		}
		if(decision.reason == REASON_NONE && token && !(device.flags & FLAG_TOKEN)){
			decision.reason = REASON_METHOD;
		}
		if(decision.reason == REASON_NONE && !token && !moment->generous && !(device.flags & ~FLAG_TOKEN)){
			decision.reason = REASON_TOKEN_EXPIRED;
		}
	}
	if(decision.reason == REASON_NONE){
		decision = decide__by(grants, access, topic, strlen(topic), moment, store__zone, &plugin->store);
	}
	if(decision.reason == REASON_NONE && token && !token__permits(token, access, topic, strlen(topic))){
		decision = (struct decision){REASON_TOKEN_SCOPE, NULL};
	}
	if(decision.grant){
		/* The name of the rule outlives the grants, which do not outlive this. */
		*copy = *decision.grant;
		memcpy(rule, copy->id, copy->id_len);
		copy->id = rule;
		decision.grant = copy;
	}
	device__clear(&device);
	return decision;
}


/* Situation                                    Answer
 * the policy allows it now, and the token      SUCCESS
 * a client takes a subscription of its own back  SUCCESS
 * anything else                                ACL_DENIED
 */
static int on_acl_check(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_acl_check *question = event_data;
	struct plugin *plugin = userdata;
	const char *id = mosquitto_client_username(question->client), *client_id = mosquitto_client_id(question->client);
	const char *action = "publish";
	struct decision decision = {REASON_NONE, NULL};
	struct moment moment = {.has_time = true, .now = wall()};
	struct session *session = NULL;
	struct grant copy;
	enum access access = ACCESS_PUBLISH;
	char rule[UINT8_MAX];

	(void)event;
	switch(question->access){
		case MOSQ_ACL_WRITE:
			break;
		case MOSQ_ACL_READ:
			access = ACCESS_DELIVER;
			action = "deliver";
			break;
		case MOSQ_ACL_SUBSCRIBE:
			access = ACCESS_SUBSCRIBE;
			action = "subscribe";
			break;
		case MOSQ_ACL_UNSUBSCRIBE:
			return MOSQ_ERR_SUCCESS;
		default:
			return MOSQ_ERR_ACL_DENIED;
	}
	look_at_changes(plugin);
	if(id == NULL){
		decision.reason = REASON_UNKNOWN_DEVICE;
	}else if(client_id == NULL || strcmp(id, client_id) != 0){
		decision.reason = REASON_CLIENT_ID;
	}else{
		session = sessions__find(&plugin->sessions, question->client, id);
		if(session == NULL){
			decision = decide_without_session(plugin, question->client, id, access, question->topic, &moment, rule, &copy);
		}else{
			sessions__confirm(&plugin->sessions, session);
			decision.reason = sessions__check(&plugin->sessions, session, moment.now);
			if(decision.reason == REASON_NONE){
				moment.family = session->from.family;
				memcpy(moment.address, session->from.address, sizeof(moment.address));
				decision = decide__by(session__grants(session), access, question->topic, strlen(question->topic), &moment,
						store__zone, &plugin->store);
				if(decision.reason == REASON_NONE && session->token
						&& !token__permits(session->token, access, question->topic, strlen(question->topic))){
					decision = (struct decision){REASON_TOKEN_SCOPE, NULL};
				}
			}
		}
	}
	if(decision.reason == REASON_NONE){
		return MOSQ_ERR_SUCCESS;
	}
	if(!plugin->kicking){ /* or the broker looks through the subscriptions of one that we send away */
		refused(plugin, access == ACCESS_DELIVER ? AUDIT_DELIVER : AUDIT_ASK, question->client, action, id,
				question->topic, decision.reason, decision.grant);
	}
	return MOSQ_ERR_ACL_DENIED;
}


/* ---- when does it end? ---- */

/* Whoever is there under the session's name. Its client is not looked at: that of a PSK whose handshake failed may be gone
 * without a word. */
static void kick(struct plugin *plugin, const struct session *session, enum reason why)
{
	struct audit_event event = {.event = "disconnected", .action = "connect", .reason = why};
	const bool pending = session->pending;
	const void *client = session->client;
	char id[BEDNET_ID_MAX + 1], address[INET6_ADDRSTRLEN];
	uint64_t suppressed = 0;

	memcpy(id, session->device->id, sizeof(id));
	event.device = event.client_id = id;
	if(session->from.family){
		event.address = inet_ntop(session->from.family == 4 ? AF_INET : AF_INET6, session->from.address, address,
				sizeof(address));
	}
	plugin->kicking = true;
	mosquitto_kick_client_by_username(id, false); /* the session may be gone now */
	plugin->kicking = false;
	if(pending){
		sessions__remove(&plugin->sessions, client);
		/* Nobody knows whether there was anyone: strangers shall not fill the log by it. */
		if(!audit__may(&plugin->audit, AUDIT_CONNECT, &event, monotonic(), &suppressed)){
			return;
		}
	}
	write_event(&event, suppressed);
}


static int tick(struct plugin *plugin, struct mosquitto_evt_tick *event)
{
	struct session *session;
	enum reason why = REASON_NONE;
	int64_t now = wall(), started = 0;
	bool more = true;

	plugin->ticked = true;
	plugin->reloading = false;
	TICK_NEXT_MS(event) = TICK_MS;
	look_at_changes(plugin);
	end_challenges(plugin);
	while(more){
		session = sessions__next_due(&plugin->sessions, now, &why, &more);
		if(session){
			kick(plugin, session, why);
		}
		if(more){
			int64_t time_now = monotonic_ns();

			started = started ? started : time_now;
			if(time_now - started > TICK_BUDGET_NS){
				TICK_NEXT_MS(event) = 1;
				break;
			}
		}
	}
	return MOSQ_ERR_SUCCESS;
}


static int on_tick(int event, void *event_data, void *userdata)
{
	(void)event;
	return tick(userdata, event_data);
}


/* The same under another address, since one function cannot be registered twice. */
static int on_tick_again(int event, void *event_data, void *userdata)
{
	(void)event;
	return tick(userdata, event_data);
}


/* Before the broker asks BASIC_AUTH again for every session. Mosquitto 2.1 ticks when it was asked to, which may be after
 * the next connection: a callback that is registered anew is called at once, before any. */
static int on_reload(int event, void *event_data, void *userdata)
{
	struct plugin *plugin = userdata;
	MOSQ_FUNC_generic_callback next = plugin->tick == on_tick ? on_tick_again : on_tick;

	(void)event;
	(void)event_data;
	if(mosquitto_callback_register(plugin->identifier, MOSQ_EVT_TICK, next, NULL, plugin) != MOSQ_ERR_SUCCESS){
		return MOSQ_ERR_NOMEM;
	}
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_TICK, plugin->tick, NULL);
	plugin->tick = next;
	plugin->reloading = true;
	return MOSQ_ERR_SUCCESS;
}


static int on_disconnect(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_disconnect *told = event_data;
	struct plugin *plugin = userdata;

	(void)event;
	forget_challenge(plugin, told->client);
	sessions__leave(&plugin->sessions, told->client);
	return MOSQ_ERR_SUCCESS;
}


/* Of 2.1 only, which says this in place of DISCONNECT where a session is left behind; 2.0 says DISCONNECT for all. */
static int on_client_offline(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_client_offline *told = event_data;
	struct plugin *plugin = userdata;

	(void)event;
	forget_challenge(plugin, told->client);
	sessions__leave(&plugin->sessions, told->client);
	return MOSQ_ERR_SUCCESS;
}


/* Of 2.1 only: a client that was given a PSK has the key. */
static int on_connect(int event, void *event_data, void *userdata)
{
	struct mosquitto_evt_connect *told = event_data;
	struct plugin *plugin = userdata;
	const char *id = mosquitto_client_username(told->client);
	struct session *session = id ? sessions__find(&plugin->sessions, told->client, id) : NULL;

	(void)event;
	if(session){
		sessions__confirm(&plugin->sessions, session);
	}
	return MOSQ_ERR_SUCCESS;
}


/* ---- from start to end ---- */

static bool read_number(const char *text, uint32_t max, uint32_t *out)
{
	uint32_t value = 0;

	if(*text == '\0'){
		return false;
	}
	for(; *text; text++){
		if(*text < '0' || *text > '9'){
			return false;
		}
		value = value * 10 + (uint32_t)(*text - '0');
		if(value > max){
			return false;
		}
	}
	*out = value;
	return value > 0;
}


static bool read_options(const struct mosquitto_opt *options, int count, const char **store, const char **audience,
		uint32_t *audit_rate, uint32_t *login_failures)
{
	int i;

	for(i = 0; i < count; i++){
		const char *key = options[i].key, *value = options[i].value ? options[i].value : "";
		bool sound = true;

		if(strcmp(key, "store") == 0){
			*store = value;
			sound = *value == '/';
		}else if(strcmp(key, "audience") == 0){
			*audience = value;
			sound = *value && strlen(value) <= AUDIENCE_MAX;
		}else if(strcmp(key, "audit_rate") == 0){
			sound = read_number(value, AUDIT_RATE_MAX, audit_rate);
		}else if(strcmp(key, "login_failures") == 0){
			sound = read_number(value, LOGIN_FAILURES_MAX, login_failures);
		}else{
			mosquitto_log_printf(MOSQ_LOG_ERR, "Error: bednet: there is no option plugin_opt_%s; there are store, "
					"audience, audit_rate and login_failures.", key);
			return false;
		}
		if(!sound){
			mosquitto_log_printf(MOSQ_LOG_ERR, "Error: bednet: plugin_opt_%s cannot be '%s'; store is an absolute path, "
					"audience a text of up to 255 bytes, audit_rate and login_failures are numbers from 1 to 1000.", key, value);
			return false;
		}
	}
	return true;
}


EXPORT int mosquitto_plugin_version(int supported_version_count, const int *supported_versions)
{
	int i;

	for(i = 0; i < supported_version_count; i++){
		if(supported_versions[i] == 5){
			return 5;
		}
	}
	return -1;
}


EXPORT int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options,
		int option_count)
{
	static const struct {
		int event;
		MOSQ_FUNC_generic_callback callback;
		bool optional;
	} callbacks[] = {
		{MOSQ_EVT_RELOAD, on_reload, false}, {MOSQ_EVT_ACL_CHECK, on_acl_check, false},
		{MOSQ_EVT_BASIC_AUTH, on_basic_auth, false}, {MOSQ_EVT_PSK_KEY, on_psk_key, false},
		{MOSQ_EVT_EXT_AUTH_START, on_auth_start, false}, {MOSQ_EVT_EXT_AUTH_CONTINUE, on_auth_continue, false},
		{MOSQ_EVT_TICK, on_tick, false}, {MOSQ_EVT_DISCONNECT, on_disconnect, false},
		{MOSQ_EVT_CONNECT, on_connect, true}, {MOSQ_EVT_CLIENT_OFFLINE, on_client_offline, true},
	};
	struct plugin *plugin;
	const char *path = STORE_USUAL, *audience = "";
	uint32_t login_failures = LOGIN_FAILURES_USUAL, audit_rate = AUDIT_RATE_USUAL;
	char why[512];
	size_t i;

	if(loaded){
		mosquitto_log_printf(MOSQ_LOG_ERR, "Error: bednet: the plugin is loaded a second time; set per_listener_settings "
				"false and load it once.");
		return MOSQ_ERR_INVAL;
	}
	if(!read_options(options, option_count, &path, &audience, &audit_rate, &login_failures)){
		return MOSQ_ERR_INVAL;
	}
	plugin = calloc(1, sizeof(*plugin));
	if(plugin == NULL){
		return MOSQ_ERR_NOMEM;
	}
	plugin->identifier = identifier;
	plugin->tick = on_tick;
	plugin->sink = (struct change_sink){on_device_changed, on_issuers_changed, on_all_changed, plugin};
	if(!throttle__init(&plugin->throttle, login_failures) || !audit__init(&plugin->audit, audit_rate)
			|| !sessions__init(&plugin->sessions, &plugin->store)
			|| RAND_priv_bytes(plugin->secret, sizeof(plugin->secret)) != 1){
		free(plugin);
		return MOSQ_ERR_UNKNOWN;
	}
	if(!store__open(&plugin->store, path, why, sizeof(why))){
		mosquitto_log_printf(MOSQ_LOG_ERR, "Error: bednet: %s.", why);
		free(plugin);
		return MOSQ_ERR_INVAL;
	}
	memcpy(plugin->audience, audience, strlen(audience) + 1);
	plugin->sessions.audience = *audience ? plugin->audience : NULL;
	for(i = 0; i < sizeof(callbacks) / sizeof(callbacks[0]); i++){
		int rc = mosquitto_callback_register(identifier, callbacks[i].event, callbacks[i].callback, NULL, plugin);

		if(rc != MOSQ_ERR_SUCCESS && !callbacks[i].optional){
			/* The broker stops; those that are registered are not called any more. */
			store__close(&plugin->store);
			free(plugin);
			return rc;
		}
	}
	loaded = true;
	*userdata = plugin;
	mosquitto_log_printf(MOSQ_LOG_INFO, "bednet: access is decided from the store in %s.", path);
	return MOSQ_ERR_SUCCESS;
}


EXPORT int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct plugin *plugin = userdata;

	(void)options;
	(void)option_count;
	if(plugin == NULL){
		return MOSQ_ERR_SUCCESS; /* it was never loaded */
	}
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_RELOAD, on_reload, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_ACL_CHECK, on_acl_check, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_BASIC_AUTH, on_basic_auth, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_PSK_KEY, on_psk_key, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_EXT_AUTH_START, on_auth_start, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_EXT_AUTH_CONTINUE, on_auth_continue, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_TICK, plugin->tick, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_DISCONNECT, on_disconnect, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_CONNECT, on_connect, NULL);
	mosquitto_callback_unregister(plugin->identifier, MOSQ_EVT_CLIENT_OFFLINE, on_client_offline, NULL);
	while(plugin->challenges.first){
		challenge__free(challenges__take(&plugin->challenges, plugin->challenges.first->client));
	}
	sessions__free(&plugin->sessions);
	token__forget_keys(&plugin->keys);
	hash__forget();
	store__close(&plugin->store);
	OPENSSL_cleanse(&plugin->throttle, sizeof(plugin->throttle));
	OPENSSL_cleanse(plugin->secret, sizeof(plugin->secret));
	free(plugin);
	loaded = false;
	return MOSQ_ERR_SUCCESS;
}
