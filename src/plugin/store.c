/* SPDX-License-Identifier: Apache-2.0
 *
 * Reading the store: an LMDB environment that bednet-store writes and we only read.
 *
 * What was seen is stamped with mdb_txn_id() of a renewed transaction, never with me_last_txnid: that moves before readers
 * see the commit, and a revocation in between would be missed for good.
 */
#include "bednet.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/evp.h>

#define DATABASES 10
#define CHANGES_MAX 4096 /* read at once; more of them count as one "everything" */

enum { CHANGE_DEVICE = 1, CHANGE_ISSUER = 5, CHANGE_TOKEN = 6, CHANGE_CUTOFF = 7 };

#define TOKEN_KEY 16 /* bytes: what stands for a token that is revoked */


static MDB_val val(const void *data, size_t len)
{
	MDB_val value;

	memcpy(&value.mv_data, &data, sizeof(value.mv_data)); /* LMDB takes no const, and writes nothing there */
	value.mv_size = len;
	return value;
}


static struct slice slice(MDB_val value)
{
	return (struct slice){value.mv_data, value.mv_size};
}


static bool read_meta(struct store *store, struct meta_record *out)
{
	MDB_val key = val("meta", 4), value;

	return mdb_get(store->txn, store->meta, &key, &value) == 0 && record__meta(slice(value), out)
			&& out->layout == RECORD_LAYOUT;
}


/* A file that ends before its last page would kill the broker with SIGBUS, at whatever time that page is wanted. */
static bool is_whole(struct store *store)
{
	MDB_envinfo info;
	MDB_stat stat;
	struct stat file;
	int fd;

	return mdb_env_info(store->env, &info) == 0 && mdb_env_stat(store->env, &stat) == 0
			&& mdb_env_get_fd(store->env, &fd) == 0 && fstat(fd, &file) == 0
			&& (uint64_t)file.st_size / stat.ms_psize > info.me_last_pgno;
}


bool store__open(struct store *store, const char *path, char *why, size_t why_len)
{
	struct {
		const char *name;
		MDB_dbi *dbi;
	} databases[DATABASES] = {
		{"meta", &store->meta}, {"devices", &store->devices}, {"profiles", &store->profiles},
		{"zones", &store->zones}, {"revoked", &store->revoked}, {"changes", &store->changes},
		{"issuers", &store->issuers}, {"keys", &store->keys}, {"tokens", &store->tokens}, {"cutoffs", &store->cutoffs},
	};
	struct meta_record meta;
	struct stat file;
	char data[PATH_MAX];
	MDB_val key = val("meta", 4), value;
	int rc;
	size_t i;

	memset(store, 0, sizeof(*store));
	/* LMDB would make an absent data.mdb, or map an empty one, only to fail with words that help nobody. */
	rc = snprintf(data, sizeof(data), "%s/data.mdb", path);
	if(rc < 0 || (size_t)rc >= sizeof(data) || stat(data, &file) != 0){
		snprintf(why, why_len, "there is no store in '%s': %s", path, strerror(errno));
		return false;
	}
	rc = mdb_env_create(&store->env);
	if(rc == 0){
		rc = mdb_env_set_maxdbs(store->env, DATABASES);
	}
	if(rc == 0){
		rc = mdb_env_open(store->env, path, MDB_RDONLY | MDB_NOTLS, 0);
	}
	if(rc != 0){
		snprintf(why, why_len, "the store in '%s' cannot be opened: %s", path, mdb_strerror(rc));
		goto failed;
	}
	if(!is_whole(store)){
		snprintf(why, why_len, "the store in '%s' is damaged: its file is shorter than what is in it", path);
		goto failed;
	}
	rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &store->txn);
	if(rc == 0){
		rc = mdb_dbi_open(store->txn, databases[0].name, 0, databases[0].dbi);
	}
	if(rc != 0){
		snprintf(why, why_len, "the store in '%s' cannot be read: %s", path, mdb_strerror(rc));
		goto failed;
	}
	if(mdb_get(store->txn, store->meta, &key, &value) != 0 || !record__meta(slice(value), &meta)){
		snprintf(why, why_len, "the store in '%s' is not bednet's: its meta record is not there, or damaged", path);
		goto failed;
	}
	if(meta.layout != RECORD_LAYOUT){
		snprintf(why, why_len, "the store in '%s' has layout %lu, and this plugin reads layout %d; install the plugin and "
				"bednet-store of one release", path, (unsigned long)meta.layout, RECORD_LAYOUT);
		goto failed;
	}
	for(i = 1; rc == 0 && i < DATABASES; i++){
		rc = mdb_dbi_open(store->txn, databases[i].name, 0, databases[i].dbi);
	}
	if(rc != 0){
		snprintf(why, why_len, "the store in '%s' cannot be read: %s", path, mdb_strerror(rc));
		goto failed;
	}
	store->seen_txn = mdb_txn_id(store->txn);
	store->seen_change = meta.last_change;
	/* Committed, the handles of the databases stay open; the transaction for later use is a new one. */
	rc = mdb_txn_commit(store->txn);
	store->txn = NULL;
	if(rc == 0){
		rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &store->txn);
	}
	if(rc != 0){
		snprintf(why, why_len, "the store in '%s' cannot be read: %s", path, mdb_strerror(rc));
		goto failed;
	}
	mdb_txn_reset(store->txn);
	return true;

failed:
	store__close(store);
	return false;
}


void store__close(struct store *store)
{
	if(store->txn){
		mdb_txn_abort(store->txn);
		store->txn = NULL;
	}
	if(store->env){
		mdb_env_close(store->env);
		store->env = NULL;
	}
}


bool store__moved(const struct store *store)
{
	MDB_envinfo info;

	return mdb_env_info(store->env, &info) != 0 || info.me_last_txnid != store->seen_txn;
}


static bool renew(struct store *store)
{
	int rc = mdb_txn_renew(store->txn);

	if(rc == MDB_MAP_RESIZED){
		rc = mdb_env_set_mapsize(store->env, 0);
		if(rc == 0){
			rc = mdb_txn_renew(store->txn);
		}
	}
	return rc == 0;
}


bool store__begin(struct store *store)
{
	return !store->unusable && renew(store);
}


void store__end(struct store *store)
{
	mdb_txn_reset(store->txn);
}


/* False when it is not a gapless list of changes from the last seen one: then everything may have changed. */
static bool read_changes(struct store *store, uint64_t last, const struct change_sink *sink)
{
	MDB_cursor *cursor = NULL;
	MDB_val key, value;
	struct slice subject;
	uint8_t next[8], kind;
	uint64_t sequence, expected = store->seen_change + 1;
	bool complete = false;
	size_t i;
	int rc;

	if(last < store->seen_change || last - store->seen_change > CHANGES_MAX){
		return false;
	}
	for(i = 0; i < sizeof(next); i++){
		next[i] = (uint8_t)(expected >> (8 * (sizeof(next) - 1 - i)));
	}
	if(mdb_cursor_open(store->txn, store->changes, &cursor) != 0){
		return false;
	}
	key = val(next, sizeof(next));
	rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
	for(; expected <= last; expected++){
		if(rc != 0 || !record__change(slice(key), slice(value), &sequence, &kind, &subject) || sequence != expected){
			goto done;
		}
		if(kind == CHANGE_ISSUER){
			sink->issuers(sink->context);
		}else if(kind == CHANGE_DEVICE || kind == CHANGE_CUTOFF){
			sink->device(sink->context, (const char *)subject.at, subject.len);
		}else if(kind == CHANGE_TOKEN && subject.len > TOKEN_KEY){
			sink->device(sink->context, (const char *)subject.at + TOKEN_KEY, subject.len - TOKEN_KEY);
		}else{
			goto done;
		}
		rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT);
	}
	complete = true;

done:
	mdb_cursor_close(cursor);
	return complete;
}


bool store__refresh(struct store *store, const struct change_sink *sink)
{
	struct meta_record meta;
	size_t txn;

	if(!renew(store)){
		return false;
	}
	txn = mdb_txn_id(store->txn);
	if(txn == store->seen_txn){
		mdb_txn_reset(store->txn); /* the commit is on its way, but not there yet */
		return true;
	}
	if(!read_meta(store, &meta)){
		/* Not a store that we can read any more. What was read before stands; nothing else is granted. */
		store->unusable = true;
		store->seen_txn = txn;
		mdb_txn_reset(store->txn);
		return false;
	}
	if(store->unusable || !read_changes(store, meta.last_change, sink)){
		memset(store->offsets, 0, sizeof(store->offsets));
		sink->everything(sink->context);
	}
	store->unusable = false;
	store->seen_txn = txn;
	store->seen_change = meta.last_change;
	mdb_txn_reset(store->txn);
	return true;
}


static int find(struct store *store, MDB_dbi dbi, const void *key, size_t len, struct slice *out)
{
	MDB_val wanted = val(key, len), value;
	int rc = mdb_get(store->txn, dbi, &wanted, &value);

	if(rc == 0){
		*out = slice(value);
	}
	return rc;
}


static enum reason get(struct store *store, MDB_dbi dbi, const void *key, size_t len, enum reason absent,
		struct slice *out)
{
	int rc = find(store, dbi, key, len, out);

	if(rc == MDB_NOTFOUND){
		return absent;
	}
	return rc == 0 ? REASON_NONE : REASON_STORE;
}


enum reason store__device(struct store *store, const char *id, size_t len, struct device_record *out)
{
	struct slice bytes;
	enum reason reason = get(store, store->devices, id, len, REASON_UNKNOWN_DEVICE, &bytes);

	if(reason == REASON_NONE && !record__device(bytes, out)){
		reason = REASON_STORE;
	}
	return reason;
}


enum reason store__profile(struct store *store, uint64_t key, struct slice *out)
{
	uint8_t raw[8];
	size_t i;

	for(i = 0; i < sizeof(raw); i++){
		raw[i] = (uint8_t)(key >> (8 * i));
	}
	return get(store, store->profiles, raw, sizeof(raw), REASON_STORE, out);
}


enum reason store__serial(struct store *store, const uint8_t *serial, size_t len)
{
	struct slice bytes;
	/* Listed at all is revoked, whatever the record says. */
	enum reason reason = get(store, store->revoked, serial, len, REASON_CERTIFICATE_REVOKED, &bytes);

	if(reason == REASON_NONE){
		return REASON_CERTIFICATE_REVOKED;
	}
	return reason == REASON_CERTIFICATE_REVOKED ? REASON_NONE : reason;
}


enum reason store__issuer(struct store *store, const char *iss, size_t len, uint8_t key[STORE_ISSUER_KEY],
		struct issuer_record *out)
{
	uint8_t digest[HASH_LEN];
	struct slice bytes;
	enum reason reason;

	if(!hash__sha256(&(struct slice){(const uint8_t *)iss, len}, 1, digest)){
		return REASON_INTERNAL;
	}
	memcpy(key, digest, STORE_ISSUER_KEY);
	reason = get(store, store->issuers, key, STORE_ISSUER_KEY, REASON_TOKEN_ISSUER, &bytes);
	if(reason == REASON_NONE && !record__issuer(bytes, out)){
		reason = REASON_STORE;
	}
	if(reason == REASON_NONE && (out->iss.len != len || memcmp(out->iss.at, iss, len) != 0)){
		reason = REASON_TOKEN_ISSUER;
	}
	return reason;
}


enum reason store__key(struct store *store, const uint8_t issuer[STORE_ISSUER_KEY], const char *kid, size_t len,
		struct key_record *out)
{
	uint8_t digest[HASH_LEN], key[2 * STORE_ISSUER_KEY];
	struct slice bytes;
	enum reason reason;

	if(!hash__sha256(&(struct slice){(const uint8_t *)kid, len}, 1, digest)){
		return REASON_INTERNAL;
	}
	memcpy(key, issuer, STORE_ISSUER_KEY);
	memcpy(key + STORE_ISSUER_KEY, digest, sizeof(key) - STORE_ISSUER_KEY);
	reason = get(store, store->keys, key, sizeof(key), REASON_TOKEN_KEY, &bytes);
	if(reason == REASON_NONE && !record__key(bytes, out)){
		reason = REASON_STORE;
	}
	if(reason == REASON_NONE && (out->kid.len != len || memcmp(out->kid.at, kid, len) != 0)){
		reason = REASON_TOKEN_KEY;
	}
	return reason;
}


enum reason store__token(struct store *store, const char *iss, const char *jti, const char *id, int64_t issued)
{
	uint8_t digest[HASH_LEN];
	struct slice names[2], bytes;
	int64_t until;
	int rc;

	rc = find(store, store->cutoffs, id, strlen(id), &bytes);
	if(rc == 0){
		if(!record__seconds(bytes, &until)){
			return REASON_STORE;
		}
		if(issued <= until){
			return REASON_TOKEN_REVOKED;
		}
	}else if(rc != MDB_NOTFOUND){
		return REASON_STORE;
	}
	if(jti == NULL){
		return REASON_NONE;
	}
	names[0] = (struct slice){(const uint8_t *)iss, strlen(iss) + 1}; /* with its NUL */
	names[1] = (struct slice){(const uint8_t *)jti, strlen(jti)};
	if(!hash__sha256(names, 2, digest)){
		return REASON_INTERNAL;
	}
	/* Listed at all is revoked, whatever the record says. */
	rc = find(store, store->tokens, digest, TOKEN_KEY, &bytes);
	if(rc != MDB_NOTFOUND){
		return rc == 0 ? REASON_TOKEN_REVOKED : REASON_STORE;
	}
	return REASON_NONE;
}


bool store__zone(void *context, uint32_t zone, int64_t at, int32_t *offset)
{
	struct store *store = context;
	uint8_t raw[4] = {(uint8_t)zone, (uint8_t)(zone >> 8), (uint8_t)(zone >> 16), (uint8_t)(zone >> 24)};
	struct slice bytes;
	size_t slot = zone % STORE_ZONES;
	bool found;

	if(store->offsets[slot].zone == zone && store->offsets[slot].from <= at && at < store->offsets[slot].until){
		*offset = store->offsets[slot].offset;
		return true;
	}
	if(!store__begin(store)){
		return false;
	}
	found = get(store, store->zones, raw, sizeof(raw), REASON_STORE, &bytes) == REASON_NONE
			&& record__zone(bytes, at, &store->offsets[slot].offset, &store->offsets[slot].from,
					&store->offsets[slot].until);
	store__end(store);
	store->offsets[slot].zone = zone;
	if(!found){
		store->offsets[slot].from = store->offsets[slot].until = 0;
		return false;
	}
	*offset = store->offsets[slot].offset;
	return true;
}
