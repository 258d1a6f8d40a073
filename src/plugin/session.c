/* SPDX-License-Identifier: Apache-2.0
 *
 * Who is connected, and what was read about them. A cache: whatever is not in it is read from the store.
 *
 * A session is known by the address of the broker's client structure AND by the device's id, since such addresses are
 * used again at once. It is made when a client has proved who it is, and taken away with the DISCONNECT event, so there
 * is one for each connection at most. Checks that come later (wills, deliveries to offline sessions) find none and make
 * none. Devices live as long as they have a session, or have left a token.
 *
 * What a token permits ends with it, and its client's will and queue end with it too. So the token of a device's last session
 * is kept when that is over, in a bounded room: where it is full, the one that lies there longest is forgotten.
 */
#include "bednet.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/rand.h>

#define SLOTS_FIRST 256 /* of both tables; a power of 2 */
#define HEAP_FIRST 64


static size_t hash_pointer(const void *client)
{
	uint64_t bits = (uint64_t)(uintptr_t)client * 0x9E3779B97F4A7C15u;

	return (size_t)(bits >> 32);
}


/* FNV-1a from a secret beginning: issuers choose ids of devices that the store does not have, and shall not choose what
 * collides. */
static size_t hash_id(const struct sessions *sessions, const char *id)
{
	uint64_t hash = sessions->secret;

	for(; *id; id++){
		hash = (hash ^ (uint8_t)*id) * 0x100000001b3u;
	}
	return (size_t)(hash ^ hash >> 32);
}


bool sessions__init(struct sessions *sessions, struct store *store)
{
	memset(sessions, 0, sizeof(*sessions));
	sessions->store = store;
	return RAND_bytes((unsigned char *)&sessions->secret, sizeof(sessions->secret)) == 1;
}


/* ---- devices ---- */

void device__clear(struct device *device)
{
	free(device->grants);
	device->grants = NULL;
}


bool device__read(struct store *store, struct device *device)
{
	struct device_record record;
	struct slice profile;
	struct grants *grants = NULL;
	size_t len = strlen(device->id);

	if(!store__begin(store)){
		/* The last that was read stands; who is not known yet is not let in. */
		if(!device->grants){
			device->state = REASON_STORE;
		}
		return false;
	}
	device->state = store__device(store, device->id, len, &record);
	if(device->state == REASON_NONE && (record.flags & FLAG_REVOKED)){
		device->state = REASON_REVOKED;
	}
	if(device->state == REASON_NONE){
		device->state = store__profile(store, record.profile, &profile);
	}
	if(device->state == REASON_NONE){
		const struct grant_source source = {profile, record.values, record.value_count};

		device->state = decide__grants(&source, 1, device->id, len, &grants);
	}
	store__end(store);
	device__clear(device);
	device->flags = 0;
	device->until = BEDNET_NEVER;
	if(device->state == REASON_NONE){
		device->grants = grants;
		device->flags = record.flags;
		device->until = record.until;
	}
	return device->state != REASON_INTERNAL;
}


/* A table of twice the size, or the one there is when there is no memory: slower, but right. */
static void grow_devices(struct sessions *sessions)
{
	size_t slots = sessions->device_slots ? sessions->device_slots * 2 : SLOTS_FIRST, i;
	struct device **table = calloc(slots, sizeof(*table)), *device;

	if(table == NULL){
		return;
	}
	for(i = 0; i < sessions->device_slots; i++){
		while((device = sessions->devices[i])){
			size_t slot = hash_id(sessions, device->id) & (slots - 1);

			sessions->devices[i] = device->next;
			device->next = table[slot];
			table[slot] = device;
		}
	}
	free(sessions->devices);
	sessions->devices = table;
	sessions->device_slots = slots;
}


static struct device *find_device(struct sessions *sessions, const char *id)
{
	struct device *device;

	if(sessions->device_slots == 0){
		return NULL;
	}
	device = sessions->devices[hash_id(sessions, id) & (sessions->device_slots - 1)];
	while(device && strcmp(device->id, id) != 0){
		device = device->next;
	}
	return device;
}


static struct device *add_device(struct sessions *sessions, const char *id)
{
	struct device *device;
	size_t slot, len = strlen(id);

	if(sessions->device_count >= sessions->device_slots){
		grow_devices(sessions);
	}
	if(sessions->device_slots == 0 || len > BEDNET_ID_MAX){
		return NULL;
	}
	device = calloc(1, sizeof(*device));
	if(device == NULL){
		return NULL;
	}
	memcpy(device->id, id, len + 1);
	device->stale = true;
	slot = hash_id(sessions, id) & (sessions->device_slots - 1);
	device->next = sessions->devices[slot];
	sessions->devices[slot] = device;
	sessions->device_count++;
	return device;
}


static void remove_device(struct sessions *sessions, struct device *device)
{
	struct device **link = &sessions->devices[hash_id(sessions, device->id) & (sessions->device_slots - 1)];

	while(*link != device){
		link = &(*link)->next;
	}
	*link = device->next;
	if(device->queued){
		for(link = &sessions->queue; *link != device; link = &(*link)->next_queued){
		}
		*link = device->next_queued;
	}
	sessions->device_count--;
	device__clear(device);
	free(device);
}


static void forget_left(struct sessions *sessions, struct device *device)
{
	if(device->left == NULL){
		return;
	}
	sessions->left_size -= device->left_size;
	token__free(device->left);
	device->left = NULL;
	if(device->left_next){
		device->left_next->left_back = device->left_back;
	}else{
		sessions->left_newest = device->left_back;
	}
	if(device->left_back){
		device->left_back->left_next = device->left_next;
	}else{
		sessions->left_oldest = device->left_next;
	}
	device->left_next = device->left_back = NULL;
	if(device->sessions == NULL){
		remove_device(sessions, device);
	}
}


/* The token is the device's from now on; there must not be one already. */
static void leave(struct sessions *sessions, struct device *device, struct token *token)
{
	device->left = token;
	device->left_back = sessions->left_newest;
	if(sessions->left_newest){
		sessions->left_newest->left_next = device;
	}else{
		sessions->left_oldest = device;
	}
	sessions->left_newest = device;
	device->left_size = token->size; /* which changes with the policy */
	sessions->left_size += device->left_size;
	while(sessions->left_size > SESSIONS_LEFT && sessions->left_oldest != device){
		forget_left(sessions, sessions->left_oldest);
	}
}


struct token *sessions__left(struct sessions *sessions, const char *id, bool any)
{
	struct device *device = find_device(sessions, id);
	struct session *session;

	if(device == NULL){
		return NULL;
	}
	for(session = any ? device->sessions : NULL; session; session = session->of_device){
		if(session->token){
			return session->token;
		}
	}
	return device->left;
}


static void queue_device(struct sessions *sessions, struct device *device)
{
	if(!device->queued){
		device->queued = true;
		device->next_queued = sessions->queue;
		sessions->queue = device;
	}
}


void sessions__changed(struct sessions *sessions, const char *id, size_t len)
{
	char text[BEDNET_ID_MAX + 1];
	struct device *device;

	if(len > BEDNET_ID_MAX){
		return;
	}
	memcpy(text, id, len);
	text[len] = '\0';
	device = find_device(sessions, text);
	if(device){
		struct session *session;

		device->stale = true;
		for(session = device->sessions; session; session = session->of_device){
			if(session->token){
				session->token->stale = true;
			}
		}
		if(device->left){
			device->left->stale = true;
		}
		queue_device(sessions, device);
	}
}


void sessions__issuers_changed(struct sessions *sessions)
{
	sessions->token_generation++;
	sessions->sweep = sessions->all;
}


void sessions__all_changed(struct sessions *sessions)
{
	sessions->generation++;
	sessions->token_generation++;
	sessions->sweep = sessions->all;
}


/* ---- ends: a heap, the earliest first ---- */

static void heap_put(struct sessions *sessions, size_t at, struct session *session)
{
	sessions->heap[at] = session;
	session->heap_at = at + 1;
}


static void heap_sift(struct sessions *sessions, size_t at)
{
	struct session *session = sessions->heap[at];

	while(at > 0 && sessions->heap[(at - 1) / 2]->end > session->end){
		heap_put(sessions, at, sessions->heap[(at - 1) / 2]);
		at = (at - 1) / 2;
	}
	while(2 * at + 1 < sessions->heap_count){
		size_t child = 2 * at + 1;

		if(child + 1 < sessions->heap_count && sessions->heap[child + 1]->end < sessions->heap[child]->end){
			child++;
		}
		if(sessions->heap[child]->end >= session->end){
			break;
		}
		heap_put(sessions, at, sessions->heap[child]);
		at = child;
	}
	heap_put(sessions, at, session);
}


static void heap_remove(struct sessions *sessions, struct session *session)
{
	size_t at = session->heap_at;

	if(at == 0){
		return;
	}
	session->heap_at = 0;
	sessions->heap_count--;
	if(at - 1 < sessions->heap_count){
		sessions->heap[at - 1] = sessions->heap[sessions->heap_count];
		heap_sift(sessions, at - 1);
	}
}


/* False when there is no memory to remember it. */
static bool schedule(struct sessions *sessions, struct session *session)
{
	int64_t end = session->device->until;

	if(session->not_after < end){
		end = session->not_after + 1; /* its last second is one of its own */
	}
	if(session->token && session->token->end < end){
		end = session->token->end;
	}
	if(end == session->end && (end == BEDNET_NEVER || session->heap_at)){
		return true;
	}
	session->end = end;
	if(end == BEDNET_NEVER){
		heap_remove(sessions, session);
		return true;
	}
	if(session->heap_at == 0){
		if(sessions->heap_count == sessions->heap_room){
			size_t room = sessions->heap_room ? sessions->heap_room * 2 : HEAP_FIRST;
			struct session **heap = realloc(sessions->heap, room * sizeof(struct session *));

			if(heap == NULL){
				return false;
			}
			sessions->heap = heap;
			sessions->heap_room = room;
		}
		heap_put(sessions, sessions->heap_count++, session);
	}
	heap_sift(sessions, session->heap_at - 1);
	return true;
}


/* ---- sessions ---- */

static void grow(struct sessions *sessions)
{
	size_t slots = sessions->slots ? sessions->slots * 2 : SLOTS_FIRST, i;
	struct session **table = calloc(slots, sizeof(*table)), *session;

	if(table == NULL){
		return;
	}
	for(i = 0; i < sessions->slots; i++){
		while((session = sessions->table[i])){
			size_t slot = hash_pointer(session->client) & (slots - 1);

			sessions->table[i] = session->next;
			session->next = table[slot];
			table[slot] = session;
		}
	}
	free(sessions->table);
	sessions->table = table;
	sessions->slots = slots;
}


static struct session **find_link(struct sessions *sessions, const void *client)
{
	struct session **link;

	if(sessions->slots == 0){
		return NULL;
	}
	link = &sessions->table[hash_pointer(client) & (sessions->slots - 1)];
	while(*link && (*link)->client != client){
		link = &(*link)->next;
	}
	return *link ? link : NULL;
}


struct session *sessions__of(struct sessions *sessions, const void *client)
{
	struct session **link = find_link(sessions, client);

	return link ? *link : NULL;
}


struct session *sessions__find(struct sessions *sessions, const void *client, const char *id)
{
	struct session *session = sessions__of(sessions, client);

	return session && strcmp(session->device->id, id) == 0 ? session : NULL;
}


void sessions__confirm(struct sessions *sessions, struct session *session)
{
	if(!session->pending){
		return;
	}
	session->pending = false;
	sessions->pending--;
	if(session->waits){
		session->waits->waits_back = session->waits_back;
	}else{
		sessions->newest = session->waits_back;
	}
	if(session->waits_back){
		session->waits_back->waits = session->waits;
	}else{
		sessions->oldest = session->waits;
	}
	session->waits = session->waits_back = NULL;
}


void sessions__remove(struct sessions *sessions, const void *client)
{
	struct session **link = find_link(sessions, client), *session;

	if(link == NULL){
		return;
	}
	session = *link;
	*link = session->next;
	sessions->count--;
	sessions__confirm(sessions, session);
	heap_remove(sessions, session);
	if(sessions->sweep == session){
		sessions->sweep = session->all;
	}
	if(session->all){
		session->all->all_back = session->all_back;
	}
	if(session->all_back){
		session->all_back->all = session->all;
	}else{
		sessions->all = session->all;
	}
	if(session->of_device){
		session->of_device->of_device_back = session->of_device_back;
	}
	if(session->of_device_back){
		session->of_device_back->of_device = session->of_device;
	}else{
		session->device->sessions = session->of_device;
	}
	if(session->device->sessions == NULL && session->device->left == NULL){
		remove_device(sessions, session->device);
	}
	challenge__free(session->challenge);
	token__free(session->token);
	free(session);
}


void sessions__leave(struct sessions *sessions, const void *client)
{
	struct session *session = sessions__of(sessions, client);
	struct device *device = session ? session->device : NULL;
	struct token *token;

	/* Of two sessions the one that took over counts; and who never came has left nothing. */
	if(session && !session->pending && device->sessions == session && session->of_device == NULL){
		token = session->token;
		session->token = NULL;
		forget_left(sessions, device);
		if(token){
			leave(sessions, device, token);
		}
	}
	sessions__remove(sessions, client);
}


static void make_room(struct sessions *sessions, const struct moment *from)
{
	struct session *session, *oldest = NULL;
	size_t same = 0;

	for(session = sessions->oldest; session; session = session->waits){
		if(session->from.family == from->family
				&& memcmp(session->from.address, from->address, sizeof(from->address)) == 0){
			oldest = oldest ? oldest : session;
			same++;
		}
	}
	if(same >= SESSIONS_PENDING_SAME){
		sessions__remove(sessions, oldest->client);
	}else if(sessions->pending == SESSIONS_PENDING){
		sessions__remove(sessions, sessions->oldest->client);
	}
}


struct session *sessions__add(struct sessions *sessions, const void *client, const char *id, enum method method,
		const struct certificate *certificate, const struct moment *from)
{
	struct session *session;
	struct device *device;
	size_t slot;

	sessions__remove(sessions, client);
	if(sessions->count >= sessions->slots){
		grow(sessions);
	}
	session = sessions->slots ? calloc(1, sizeof(*session)) : NULL;
	if(session == NULL){
		return NULL;
	}
	device = find_device(sessions, id);
	if(device == NULL){
		device = add_device(sessions, id);
	}
	if(device == NULL){
		free(session);
		return NULL;
	}
	session->client = client;
	session->device = device;
	session->method = method;
	session->from = *from;
	session->end = session->not_after = BEDNET_NEVER;
	session->generation = sessions->generation - 1; /* its serial number is yet to be looked up */
	if(certificate){
		memcpy(session->serial, certificate->serial, certificate->serial_len);
		session->serial_len = certificate->serial_len;
		session->not_after = certificate->not_after;
		session->serial_state = REASON_STORE; /* until it was looked up */
	}
	slot = hash_pointer(client) & (sessions->slots - 1);
	session->next = sessions->table[slot];
	sessions->table[slot] = session;
	sessions->count++;
	session->all = sessions->all;
	if(session->all){
		session->all->all_back = session;
	}
	sessions->all = session;
	session->of_device = device->sessions;
	if(session->of_device){
		session->of_device->of_device_back = session;
	}
	device->sessions = session;
	if(method == METHOD_PSK){
		/* Asked for by somebody who may not have the key, and the broker does not always say when such a handshake
		 * fails. So the number of those that were not heard of is bounded, and that of one address first: who
		 * makes many makes room for them out of its own. */
		make_room(sessions, from);
		session->pending = true;
		session->waits_back = sessions->newest;
		if(sessions->newest){
			sessions->newest->waits = session;
		}else{
			sessions->oldest = session;
		}
		sessions->newest = session;
		sessions->pending++;
	}
	return session;
}


void sessions__authorise(struct session *session, struct token *token)
{
	token__free(session->token);
	session->token = token;
}


void sessions__break(struct sessions *sessions, struct session *session, enum reason why)
{
	session->broken = why;
	queue_device(sessions, session->device);
}


enum reason sessions__token(struct sessions *sessions, struct token *token, const char *id, int64_t now)
{
	struct token_question question = {.store = sessions->store, .audience = sessions->audience, .now = now};

	if((token->stale || token->generation != sessions->token_generation) && store__begin(sessions->store)){
		token->state = token__check(token, &question);
		store__end(sessions->store);
		if(token->state == REASON_NONE && strcmp(token->id, id) != 0){
			token->state = REASON_TOKEN_CLAIMS;
		}
		/* What had no memory is tried again with the next question. */
		token->stale = token->state == REASON_INTERNAL;
		token->generation = sessions->token_generation;
	}
	return token->state;
}


const struct grants *session__grants(const struct session *session)
{
	return session->token && session->token->made ? session->token->grants : session->device->grants;
}


bool sessions__expect(struct sessions *sessions, struct session *session, int64_t until)
{
	session->device->until = until;
	return schedule(sessions, session);
}


enum reason sessions__check(struct sessions *sessions, struct session *session, int64_t now)
{
	struct device *device = session->device;
	enum reason reason;

	if(device->stale || device->generation != sessions->generation){
		/* What could not be read is tried again with the next question. */
		device->stale = !device__read(sessions->store, device);
		device->generation = sessions->generation;
	}
	if(session->generation != sessions->generation){
		if(session->serial_len == 0){
			session->generation = sessions->generation;
		}else if(store__begin(sessions->store)){
			session->serial_state = store__serial(sessions->store, session->serial, session->serial_len);
			store__end(sessions->store);
			session->generation = sessions->generation;
		}
	}
	if(session->broken != REASON_NONE){
		return session->broken;
	}
	if(session->token){
		reason = sessions__token(sessions, session->token, device->id, now);
		if(reason != REASON_NONE){
			return reason;
		}
	}
	if(!session->token || !session->token->made){
		if(device->state != REASON_NONE){
			return device->state;
		}
		if(!(device->flags & (uint8_t)session->method)){
			return REASON_METHOD;
		}
	}
	if(!schedule(sessions, session)){
		return REASON_INTERNAL;
	}
	if(now >= device->until){
		return REASON_UNTIL;
	}
	if(session->token && now >= session->token->end){
		return REASON_TOKEN_EXPIRED;
	}
	if(session->serial_state != REASON_NONE){
		return session->serial_state;
	}
	return now > session->not_after ? REASON_CERTIFICATE_TIME : REASON_NONE;
}


/* What has no memory now may have it later: the next message is refused, the connection stays. */
static bool is_due(struct sessions *sessions, struct session *session, int64_t now, enum reason *why)
{
	if(session->dead){
		return false;
	}
	*why = sessions__check(sessions, session, now);
	session->dead = *why != REASON_NONE && *why != REASON_INTERNAL;
	return session->dead;
}


struct session *sessions__next_due(struct sessions *sessions, int64_t now, enum reason *why, bool *more)
{
	struct session *session = NULL;
	struct device *device;

	*more = true;
	if(sessions->queue){
		/* Its sessions one by one: it leaves the queue when all of them were looked at. */
		device = sessions->queue;
		for(session = device->sessions; session; session = session->of_device){
			if(is_due(sessions, session, now, why)){
				return session;
			}
		}
		sessions->queue = device->next_queued;
		device->queued = false;
		return NULL;
	}
	if(sessions->heap_count && sessions->heap[0]->end <= now){
		session = sessions->heap[0];
		heap_remove(sessions, session);
		session->end = BEDNET_NEVER;
	}else if(sessions->sweep){
		session = sessions->sweep;
		sessions->sweep = session->all;
	}else{
		*more = false;
		return NULL;
	}
	return is_due(sessions, session, now, why) ? session : NULL;
}


void sessions__free(struct sessions *sessions)
{
	while(sessions->all){
		sessions__remove(sessions, sessions->all->client);
	}
	while(sessions->left_oldest){
		forget_left(sessions, sessions->left_oldest);
	}
	free(sessions->table);
	free(sessions->devices);
	free(sessions->heap);
	memset(sessions, 0, sizeof(*sessions));
}
