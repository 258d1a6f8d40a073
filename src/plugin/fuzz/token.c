/* SPDX-License-Identifier: Apache-2.0
 *
 * A token as it comes; and header and claims, in JSON with a line end between them, as if their signature was right: held
 * against a store with two issuers. Whatever is let in has a device, an end, and a scope that is made of filters.
 */
#include "fuzz.h"

#include <stdio.h>
#include <unistd.h>

#define NOW 1000

/* As store__issuer and store__key look for them. */
static void add(MDB_txn *txn, const char *database, const char *const *names, const void *data, size_t len)
{
	uint8_t digest[EVP_MAX_MD_SIZE], key[32];
	MDB_val mdb_key = {0, key}, value = {len, (void *)(uintptr_t)data};
	MDB_dbi dbi;

	for(; *names; names++){
		MUST(EVP_Digest(*names, strlen(*names), digest, NULL, EVP_sha256(), NULL) == 1);
		memcpy(key + mdb_key.mv_size, digest, 8);
		mdb_key.mv_size += 8;
	}
	MUST(mdb_dbi_open(txn, database, MDB_CREATE, &dbi) == 0);
	MUST(!data || mdb_put(txn, dbi, &mdb_key, &value, 0) == 0);
}

#define TEXT(BYTES) BYTES, sizeof(BYTES) - 1


static void make_store(struct store *store, uint8_t print[HASH_LEN])
{
	static const char aif[] = "\1\1\17\0\36\0\0\0\0\16\0\0" "\1\0a" "\1\1\0m" "\2\6at+jwt\0" "\3sub\0\0\0";
	static const char roles[] = "\1\12\17\0\36\0\0\0\0\16\0\0" "\1\0b" "\1\1\0m" "\1\6at+jwt" "\3sub\2x-\3a.r"
			"\2" "\1\0s\0\0\0\0\0\0\0\0\1\6k.io.v" "\1\0t\0\0\0\0\0\0\0\0\0";
	static const char profile[] = "\1\0\1\0\1r\1\1\0\0\6\0a/\377\0/#";
	static const char spki[] = /* of a P-256 key: the generator (SEC 2, 2.4.2) */
			"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04"
			"\x6b\x17\xd1\xf2\xe1\x2c\x42\x47\xf8\xbc\xe6\xe5\x63\xa4\x40\xf2\x77\x03\x7d\x81\x2d\xeb\x33\xa0\xf4\xa1\x39\x45"
			"\xd8\x98\xc2\x96\x4f\xe3\x42\xe2\xfe\x1a\x7f\x9b\x8e\xe7\xeb\x4a\x7c\x0f\x9e\x16\x2b\xce\x33\x57\x6b\x31\x5e\xce"
			"\xcb\xb6\x40\x68\x37\xbf\x51\xf5";
	static const char meta[] = "BEDNETST\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
	char folder[] = "/tmp/bednet-fuzz-XXXXXX", path[64], why[256], key[128] = "\1\1\1k";
	const char *const a[] = {"a", NULL}, *const b[] = {"b", NULL}, *const a_k[] = {"a", "k", NULL};
	const char *const b_k[] = {"b", "k", NULL}, *const none[] = {NULL};
	uint8_t digest[EVP_MAX_MD_SIZE], zero[8] = {0};
	MDB_val meta_key = {4, (void *)(uintptr_t)"meta"}, meta_value = {40, (void *)(uintptr_t)meta};
	MDB_val profile_key = {8, zero}, profile_value = {sizeof(profile) - 1, (void *)(uintptr_t)profile};
	MDB_val device_key = {1, (void *)(uintptr_t)"d"}, device_value = {20, (void *)(uintptr_t)"\1\20\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"};
	MDB_env *env;
	MDB_txn *txn;
	MDB_dbi dbi;

	MUST(mkdtemp(folder) && mdb_env_create(&env) == 0 && mdb_env_set_maxdbs(env, 10) == 0);
	MUST(mdb_env_open(env, folder, MDB_NOSYNC, 0600) == 0 && mdb_txn_begin(env, NULL, 0, &txn) == 0);
	add(txn, "issuers", a, TEXT(aif));
	add(txn, "issuers", b, TEXT(roles));
	key[4] = sizeof(spki) - 1;
	memcpy(key + 6, spki, sizeof(spki) - 1);
	add(txn, "keys", a_k, key, 6 + sizeof(spki) - 1);
	add(txn, "keys", b_k, key, 6 + sizeof(spki) - 1);
	add(txn, "zones", none, NULL, 0);
	add(txn, "revoked", none, NULL, 0);
	add(txn, "changes", none, NULL, 0);
	add(txn, "tokens", none, NULL, 0);
	add(txn, "cutoffs", none, NULL, 0);
	MUST(mdb_dbi_open(txn, "meta", MDB_CREATE, &dbi) == 0 && mdb_put(txn, dbi, &meta_key, &meta_value, 0) == 0);
	MUST(mdb_dbi_open(txn, "profiles", MDB_CREATE, &dbi) == 0 && mdb_put(txn, dbi, &profile_key, &profile_value, 0) == 0);
	MUST(mdb_dbi_open(txn, "devices", MDB_CREATE, &dbi) == 0 && mdb_put(txn, dbi, &device_key, &device_value, 0) == 0);
	MUST(mdb_txn_commit(txn) == 0);
	mdb_env_close(env);
	MUST(store__open(store, folder, why, sizeof(why)));
	/* It is open: its files may go. */
	(void)snprintf(path, sizeof(path), "%s/data.mdb", folder);
	(void)unlink(path);
	(void)snprintf(path, sizeof(path), "%s/lock.mdb", folder);
	(void)unlink(path);
	(void)rmdir(folder);
	MUST(EVP_Digest(spki, sizeof(spki) - 1, digest, NULL, EVP_sha256(), NULL) == 1);
	memcpy(print, digest, HASH_LEN);
}


static void ask(struct token *token, const struct token_question *question)
{
	enum reason reason;
	size_t i;

	MUST(store__begin(question->store));
	reason = token__check(token, question);
	store__end(question->store);
	if(reason != REASON_NONE){
		return;
	}
	MUST(token->verified && record__id_ok(token->id, strlen(token->id)) && token->end > NOW);
	MUST(token->made == (token->grants != NULL) && !(token->made && token->limited));
	for(i = 0; i < token->permission_count; i++){
		MUST(topics__filter_ok(token->permissions[i].filter, token->permissions[i].len));
		MUST(token->permissions[i].publish || token->permissions[i].subscribe);
	}
	for(i = ACCESS_PUBLISH; i <= ACCESS_DELIVER; i++){
		(void)token__permits(token, (enum access)i, "a/b", 3);
	}
}


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct store store;
	static uint8_t print[HASH_LEN];
	struct token_keys keys = {0};
	struct token_question question = {.store = &store, .keys = &keys, .audience = "own", .now = NOW};
	const uint8_t *end = size ? memchr(data, '\n', size) : NULL;
	struct token *token;
	enum reason reason;
	int i;

	if(!store.env){
		make_store(&store, print);
	}
	(void)token__is((const char *)data, size);
	token = token__read((const char *)data, size, &reason);
	MUST((token != NULL) == (reason == REASON_NONE));
	if(token){
		ask(token, &question);
		token__free(token);
	}
	for(i = 0; end && i < 3; i++){
		token = calloc(1, sizeof(*token));
		MUST(token);
		token->header = (struct slice){data, (size_t)(end - data)};
		token->payload = (struct slice){end + 1, size - token->header.len - 1};
		token->signature = (struct slice){data, 0};
		token->verified = i > 0;
		question.proves = i == 2;
		memcpy(token->key_print, print, sizeof(print));
		ask(token, &question);
		token->header.len = token->payload.len = 0; /* the input's, not the token's */
		token__free(token);
	}
	token__forget_keys(&keys);
	return 0;
}
