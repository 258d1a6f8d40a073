/* SPDX-License-Identifier: Apache-2.0
 *
 * Unit tests of what decides, under the address and undefined-behaviour sanitizers: `make check`.
 *
 * Allocations go through a shim that lets the n-th one fail; test_every_allocation_may_fail lets each of them fail once.
 */
#include "../bednet.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/ecdsa.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rsa.h>

#define CHECK(condition) \
	do{ \
		if(!(condition)){ \
			fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
			exit(1); \
		} \
	}while(0)

#define HOUR 3600
#define DAY 86400
#define MONDAY 1732492800 /* 2024-11-25T00:00:00Z */

/* ---- the shim ---- */

static long fail_at = -1, allocations;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);


static bool fails(void)
{
	return allocations++ == fail_at;
}


void *__wrap_malloc(size_t size)
{
	return fails() ? NULL : __real_malloc(size);
}


void *__wrap_calloc(size_t count, size_t size)
{
	return fails() ? NULL : __real_calloc(count, size);
}


void *__wrap_realloc(void *old, size_t size)
{
	return fails() ? NULL : __real_realloc(old, size);
}


/* ---- records, written by hand ---- */

struct bytes {
	uint8_t at[4096];
	size_t len;
};


static void put(struct bytes *bytes, const void *data, size_t len)
{
	CHECK(bytes->len + len <= sizeof(bytes->at));
	memcpy(bytes->at + bytes->len, data, len);
	bytes->len += len;
}


static void put_int(struct bytes *bytes, uint64_t value, size_t width)
{
	for(; width > 0; width--, value >>= 8){
		uint8_t byte = (uint8_t)value;

		put(bytes, &byte, 1);
	}
}


static void put_text(struct bytes *bytes, const char *text, size_t width)
{
	put_int(bytes, strlen(text), width);
	put(bytes, text, strlen(text));
}


static struct slice slice_of(const struct bytes *bytes)
{
	return (struct slice){bytes->at, bytes->len};
}


static const uint8_t psk[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};


static struct bytes a_device(uint8_t flags, int64_t until)
{
	struct bytes bytes = {.len = 0};
	uint8_t hash[64] = {0};

	put_int(&bytes, 1, 1);
	put_int(&bytes, flags, 1);
	put_int(&bytes, 0, 1);
	put_int(&bytes, 2, 1);
	put_int(&bytes, 7, 8);
	put_int(&bytes, (uint64_t)until, 8);
	put_text(&bytes, "hall-1", 1);
	put_text(&bytes, "1", 1);
	if(flags & FLAG_PASSWORD){
		CHECK(PKCS5_PBKDF2_HMAC("secret", 6, (const uint8_t *)"salt", 4, 101, EVP_sha512(), sizeof(hash), hash) == 1);
		put_int(&bytes, 101, 4);
		put_text(&bytes, "salt", 1);
		put_int(&bytes, sizeof(hash), 1);
		put(&bytes, hash, sizeof(hash));
	}
	if(flags & FLAG_PSK){
		put_int(&bytes, sizeof(psk), 1);
		put(&bytes, psk, sizeof(psk));
	}
	return bytes;
}


struct a_rule {
	const char *id;
	uint8_t effect, access;
	const char *topic; /* the byte 0xFF and a number stand for a placeholder */
	size_t topic_len;
	const struct window *window;
	const struct network *network;
};


static struct bytes a_profile(const struct a_rule *rules, size_t count)
{
	struct bytes bytes = {.len = 0};
	size_t i;

	put_int(&bytes, 1, 1);
	put_int(&bytes, 0, 1);
	put_int(&bytes, count, 2);
	for(i = 0; i < count; i++){
		put_text(&bytes, rules[i].id, 1);
		put_int(&bytes, rules[i].effect, 1);
		put_int(&bytes, rules[i].access, 1);
		put_int(&bytes, rules[i].window ? 1 : 0, 1);
		put_int(&bytes, rules[i].network ? 1 : 0, 1);
		if(rules[i].window){
			put_int(&bytes, rules[i].window->days, 1);
			put_int(&bytes, 0, 3);
			put_int(&bytes, rules[i].window->from, 4);
			put_int(&bytes, rules[i].window->to, 4);
			put_int(&bytes, rules[i].window->zone, 4);
		}
		if(rules[i].network){
			put_int(&bytes, rules[i].network->family, 1);
			put_int(&bytes, rules[i].network->prefix, 1);
			put(&bytes, rules[i].network->address, rules[i].network->family == 4 ? 4 : 16);
		}
		put_int(&bytes, rules[i].topic_len, 2);
		put(&bytes, rules[i].topic, rules[i].topic_len);
	}
	return bytes;
}

#define RULE(ID, EFFECT, ACCESS, TOPIC) {.id = ID, .effect = EFFECT, .access = ACCESS, .topic = TOPIC, .topic_len = sizeof(TOPIC) - 1}

/* ---- a store, written by hand ---- */

static char folder[] = "/tmp/bednet-unit-XXXXXX";

struct writer {
	MDB_env *env;
	MDB_txn *txn;
	uint64_t change;
};


static void write_record(struct writer *writer, const char *database, const void *key, size_t key_len, const void *data,
		size_t len)
{
	MDB_val mdb_key = {key_len, (void *)(uintptr_t)key}, value = {len, (void *)(uintptr_t)data};
	MDB_dbi dbi;

	CHECK(mdb_dbi_open(writer->txn, database, MDB_CREATE, &dbi) == 0);
	if(data){
		CHECK(mdb_put(writer->txn, dbi, &mdb_key, &value, 0) == 0);
	}else{
		CHECK(mdb_del(writer->txn, dbi, &mdb_key, NULL) == 0);
	}
}


static void write_begin(struct writer *writer)
{
	CHECK(mdb_txn_begin(writer->env, NULL, 0, &writer->txn) == 0);
}


static void write_change(struct writer *writer, uint8_t kind, const char *subject)
{
	uint8_t key[8];
	struct bytes value = {.len = 0};
	size_t i;

	writer->change++;
	for(i = 0; i < sizeof(key); i++){
		key[i] = (uint8_t)(writer->change >> (8 * (7 - i)));
	}
	put_int(&value, kind, 1);
	put(&value, subject, strlen(subject));
	write_record(writer, "changes", key, sizeof(key), value.at, value.len);
}


static void write_commit(struct writer *writer)
{
	struct bytes meta = {.len = 0};

	put(&meta, "BEDNETST", 8);
	put_int(&meta, RECORD_LAYOUT, 4);
	put_int(&meta, 0, 4);
	put_int(&meta, writer->change, 8);
	put_int(&meta, 1, 8);
	put_int(&meta, 1, 8);
	write_record(writer, "meta", "meta", 4, meta.at, meta.len);
	CHECK(mdb_txn_commit(writer->txn) == 0);
}


static void write_device(struct writer *writer, const char *id, uint8_t flags, int64_t until)
{
	struct bytes device = a_device(flags, until);

	write_record(writer, "devices", id, strlen(id), device.at, device.len);
	write_change(writer, 1, id);
}


static int remove_entry(const char *path, const struct stat *stat, int type, struct FTW *ftw)
{
	(void)stat;
	(void)type;
	(void)ftw;
	return remove(path);
}


static void remove_store(void)
{
	nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}


/* ---- tokens ---- */

#define ISS "https://tokens.example"
#define ISS_FOREIGN "https://sso.example"
#define ISS_CLOUD "https://cloud.example" /* names with dots, roles in one text */
#define TOKEN_TIME 100000 /* seconds; what the tests take for now */

/* Keys of issuers, made once. */
static EVP_PKEY *keys[3]; /* P-256, Ed25519, RSA */
enum { KEY_EC, KEY_ED, KEY_RSA };


static void make_keys(void)
{
	keys[KEY_EC] = EVP_EC_gen("P-256");
	keys[KEY_ED] = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
	keys[KEY_RSA] = EVP_RSA_gen(2048);
	CHECK(keys[KEY_EC] && keys[KEY_ED] && keys[KEY_RSA]);
}


static void free_keys(void)
{
	size_t i;

	for(i = 0; i < sizeof(keys) / sizeof(keys[0]); i++){
		EVP_PKEY_free(keys[i]);
	}
}


static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";


static void encode(const void *data, size_t len, char *out)
{
	const uint8_t *at = data;
	size_t i;

	out += strlen(out);
	for(i = 0; i < len * 8; i += 6){
		const unsigned int pair = (unsigned int)at[i / 8] << 8 | (i / 8 + 1 < len ? at[i / 8 + 1] : 0);

		*out++ = digits[pair >> (10 - i % 8) & 63];
	}
	*out = '\0';
}


/* A signature as JWS has it; by an RSA key for RS256, or for PS256. */
static size_t sign_as(EVP_PKEY *key, bool pss, const void *text, size_t len, uint8_t out[512])
{
	EVP_MD_CTX *context = EVP_MD_CTX_new();
	EVP_PKEY_CTX *padding = NULL;
	size_t size = 512;

	CHECK(EVP_DigestSignInit(context, &padding, EVP_PKEY_is_a(key, "ED25519") ? NULL : EVP_sha256(), NULL, key) == 1);
	CHECK(!pss || (EVP_PKEY_CTX_set_rsa_padding(padding, RSA_PKCS1_PSS_PADDING) == 1
			&& EVP_PKEY_CTX_set_rsa_pss_saltlen(padding, RSA_PSS_SALTLEN_DIGEST) == 1));
	CHECK(EVP_DigestSign(context, out, &size, text, len) == 1);
	EVP_MD_CTX_free(context);
	if(EVP_PKEY_is_a(key, "EC")){
		const uint8_t *at = out;
		ECDSA_SIG *both = d2i_ECDSA_SIG(NULL, &at, (long)size);

		CHECK(both && BN_bn2binpad(ECDSA_SIG_get0_r(both), out, 32) == 32
				&& BN_bn2binpad(ECDSA_SIG_get0_s(both), out + 32, 32) == 32);
		ECDSA_SIG_free(both);
		size = 64;
	}
	return size;
}


static size_t sign(EVP_PKEY *key, const void *text, size_t len, uint8_t out[512])
{
	return sign_as(key, false, text, len, out);
}


static const char *a_token_of(const char *header, const char *payload, EVP_PKEY *key)
{
	static char text[16384];
	uint8_t signature[512];
	size_t len;

	text[0] = '\0';
	encode(header, strlen(header), text);
	strcat(text, ".");
	encode(payload, strlen(payload), text);
	len = sign_as(key, strstr(header, "PS256") != NULL, text, strlen(text), signature);
	strcat(text, ".");
	encode(signature, len, text);
	return text;
}


/* One of the usual issuer; `claims` begin with a comma, or are empty. */
static const char *a_token(const char *sub, int64_t exp, const char *claims)
{
	static char payload[8192];

	(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS "\",\"aud\":\"mqtts://plant\",\"iat\":%d,\"exp\":%lld,\"sub\":\"%s\"%s}",
			TOKEN_TIME, (long long)exp, sub, claims);
	return a_token_of("{\"alg\":\"ES256\",\"typ\":\"at+jwt\",\"kid\":\"1\"}", payload, keys[KEY_EC]);
}


static void put_hash(struct bytes *bytes, const void *data, size_t len, size_t width)
{
	uint8_t digest[EVP_MAX_MD_SIZE];

	CHECK(EVP_Digest(data, len, digest, NULL, EVP_sha256(), NULL) == 1);
	put(bytes, digest, width);
}


static struct bytes an_issuer(const char *iss, uint8_t flags)
{
	struct bytes bytes = {.len = 0};

	put_int(&bytes, 1, 1);
	put_int(&bytes, flags, 1);
	put_int(&bytes, 15, 2);
	put_int(&bytes, 5, 4); /* leeway */
	put_int(&bytes, 3600, 4); /* longest */
	put_text(&bytes, iss, 2);
	put_int(&bytes, 2, 1);
	put_text(&bytes, "mqtts://other", 2);
	put_text(&bytes, "mqtts://plant", 2);
	put_int(&bytes, 2, 1);
	put_text(&bytes, "at+jwt", 1);
	put_text(&bytes, "", 1);
	put_text(&bytes, flags & ISSUER_SPACED ? "k.io.sa.name" : "sub", 1);
	put_text(&bytes, flags & ISSUER_ROLES ? "x-" : "", 1);
	put_text(&bytes, flags & ISSUER_SPACED ? "r.a.b.roles" : flags & ISSUER_ROLES ? "a.roles" : "", 1);
	put_int(&bytes, flags & ISSUER_ROLES ? 2 : 0, 1);
	if(flags & ISSUER_ROLES){
		put_text(&bytes, "sensor", 2);
		put_int(&bytes, 7, 8);
		put_int(&bytes, 2, 1);
		put_text(&bytes, "hall", 1);
		put_text(&bytes, "a.desk", 1);
		put_text(&bytes, "nothing", 2);
		put_int(&bytes, 8, 8);
		put_int(&bytes, 0, 1);
	}
	return bytes;
}


static struct bytes a_key(EVP_PKEY *key, const char *kid)
{
	struct bytes bytes = {.len = 0};
	uint8_t *spki = NULL;
	int len = i2d_PUBKEY(key, &spki);

	put_int(&bytes, 1, 1);
	put_int(&bytes, key == keys[KEY_EC] ? ALGORITHM_ES256 : key == keys[KEY_ED] ? ALGORITHM_EDDSA : ALGORITHM_RS256, 1);
	put_text(&bytes, kid, 1);
	put_int(&bytes, (uint64_t)len, 2);
	put(&bytes, spki, (size_t)len);
	OPENSSL_free(spki);
	return bytes;
}


static void write_issuer(struct writer *writer, const char *iss, uint8_t flags)
{
	struct bytes issuer = an_issuer(iss, flags), name = {.len = 0};
	size_t i;

	put_hash(&name, iss, strlen(iss), 8);
	write_record(writer, "issuers", name.at, name.len, issuer.at, issuer.len);
	for(i = 0; i < sizeof(keys) / sizeof(keys[0]); i++){
		const char kid[] = {(char)('1' + i), '\0'};
		struct bytes key = a_key(keys[i], kid), key_name = name;

		put_hash(&key_name, kid, 1, 8);
		write_record(writer, "keys", key_name.at, key_name.len, key.at, key.len);
	}
}


static void write_issuers(struct writer *writer)
{
	write_issuer(writer, ISS, ISSUER_AIF);
	write_issuer(writer, ISS_FOREIGN, ISSUER_ROLES);
	write_issuer(writer, ISS_CLOUD, ISSUER_ROLES | ISSUER_SPACED);
	write_record(writer, "tokens", "nobody's", 8, "x", 1);
	write_record(writer, "cutoffs", "nobody", 6, "x", 1);
}


/* A store with temp-1 to temp-3. LMDB must not open one environment twice in a process: the writer is another one. */
static struct writer write_store(void)
{
	static const struct a_rule rules[] = {
		RULE("role/sensor/allow/publish/0", EFFECT_ALLOW, 1, "sensors/\xff\x00/#"),
		RULE("role/sensor/allow/subscribe/0", EFFECT_ALLOW, 2, "halls/\xff\x01/\xff\x02"),
	};
	struct writer writer = {0};
	struct bytes profile = a_profile(rules, 2), key = {.len = 0};

	strcpy(folder + strlen(folder) - 6, "XXXXXX");
	CHECK(mkdtemp(folder));
	CHECK(mdb_env_create(&writer.env) == 0);
	CHECK(mdb_env_set_maxdbs(writer.env, 10) == 0);
	CHECK(mdb_env_open(writer.env, folder, MDB_NOSYNC | MDB_NOTLS, 0600) == 0);
	write_begin(&writer);
	put_int(&key, 7, 8);
	write_record(&writer, "profiles", key.at, key.len, profile.at, profile.len);
	write_record(&writer, "zones", "zone", 4, "x", 1);
	write_record(&writer, "revoked", "\x01\x02", 2, "\x01", 1);
	write_issuers(&writer);
	write_device(&writer, "temp-1", FLAG_CERTIFICATE | FLAG_PASSWORD | FLAG_PSK, 0);
	write_device(&writer, "temp-2", FLAG_CERTIFICATE, 2000);
	write_device(&writer, "temp-3", FLAG_PSK, 0);
	write_device(&writer, "tok-1", FLAG_TOKEN, 0);
	write_commit(&writer);
	return writer;
}


/* ---- tests ---- */

static void test_filters(void)
{
	static const struct {
		const char *ours, *theirs;
		bool covers;
	} cases[] = {
		{"#", "a", true}, {"#", "#", true}, {"#", "$SYS/a", false}, {"+/a", "$SYS/a", false}, {"$SYS/#", "$SYS/a", true},
		{"a/#", "a", true}, {"a/#", "a/#", true}, {"a/#", "a/b/c", true}, {"a/+", "a/#", false}, {"a/+", "a/", true},
		{"a/+", "a", false}, {"+", "#", false}, {"+/#", "#", true}, {"#", "+/#", true}, {"a", "+", false},
		{"/a", "/a", true}, {"+/a", "/a", true}, {"a//b", "a//b", true}, {"a/+/b", "a//b", true}, {"a/b", "a/b/", false},
	};
	size_t i;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		CHECK(topics__covers(cases[i].ours, strlen(cases[i].ours), cases[i].theirs, strlen(cases[i].theirs))
				== cases[i].covers);
		CHECK(!topics__name_ok(cases[i].theirs, strlen(cases[i].theirs)) || cases[i].covers
				== topics__matches(cases[i].ours, strlen(cases[i].ours), cases[i].theirs, strlen(cases[i].theirs)));
	}
	CHECK(topics__filter_ok("a/+/#", 5) && topics__filter_ok("/", 1) && topics__filter_ok("#", 1));
	CHECK(!topics__filter_ok("", 0) && !topics__filter_ok("a#", 2) && !topics__filter_ok("#/a", 3));
	CHECK(!topics__filter_ok("a+/b", 4) && !topics__filter_ok("a\0b", 3) && !topics__name_ok("a/+", 3));
}


static void test_shared_subscriptions(void)
{
	static const struct {
		const char *filter, *inner; /* NULL: malformed */
	} cases[] = {
		{"$share/g/a/#", "a/#"}, {"a/#", "a/#"}, {"$sharex/g/a", "$sharex/g/a"}, {"$share/g//", "/"}, {"$share", NULL},
		{"$share/", NULL}, {"$share/g", NULL}, {"$share/g/", NULL}, {"$share//a", NULL}, {"$share/+/a", NULL},
		{"$share/#/a", NULL}, {"$shar", "$shar"},
	};
	size_t i;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		const char *filter = cases[i].filter;
		size_t len = strlen(filter);
		bool sound = topics__unshare(&filter, &len);

		CHECK(sound == (cases[i].inner != NULL));
		CHECK(!sound || (len == strlen(cases[i].inner) && memcmp(filter, cases[i].inner, len) == 0));
	}
}


static enum reason grants_of(struct slice profile, const struct device_record *record, struct grants **out)
{
	const struct grant_source source = {profile, record->values, record->value_count};

	return decide__grants(&source, 1, "temp-1", 6, out);
}


/* Each record, cut short anywhere, or with a byte too many, does not parse; copies on the heap let the sanitizer see. */
static void test_cut_records_do_not_parse(void)
{
	static const struct window window = {.days = 1, .from = 0, .to = DAY, .zone = 1};
	static const struct network network = {.family = 6, .prefix = 128};
	struct a_rule rule = RULE("r", EFFECT_DENY, 2, "a/#");
	struct bytes device = a_device(FLAG_CERTIFICATE | FLAG_PASSWORD | FLAG_PSK, 5), profile;
	struct device_record record;
	size_t len;

	rule.window = &window;
	rule.network = &network;
	profile = a_profile(&rule, 1);
	CHECK(record__device(slice_of(&device), &record));
	CHECK(record.until == 5 && record.value_count == 2 && record.psk.len == sizeof(psk) && record.hash.len == 64);
	for(len = 0; len <= device.len + 1; len++){
		uint8_t *copy = calloc(1, len + 1);

		memcpy(copy, device.at, len < device.len ? len : device.len);
		CHECK(record__device((struct slice){copy, len}, &record) == (len == device.len));
		free(copy);
	}
	for(len = 0; len <= profile.len + 1; len++){
		struct device_record plain = {.value_count = 0};
		struct grants *grants;
		uint8_t *copy = calloc(1, len + 1);

		memcpy(copy, profile.at, len < profile.len ? len : profile.len);
		CHECK((grants_of((struct slice){copy, len}, &plain, &grants) == REASON_NONE)
				== (len == profile.len));
		free(grants);
		free(copy);
	}
}


static void test_values_stay_within_their_level(void)
{
	static const char *const bad[] = {"a/b", "+", "#", "a+", ""};
	struct device_record record;
	size_t i;

	for(i = 0; i < sizeof(bad) / sizeof(bad[0]); i++){
		struct bytes bytes = {.len = 0};

		put_int(&bytes, 1, 1);
		put_int(&bytes, FLAG_CERTIFICATE, 1);
		put_int(&bytes, 0, 1);
		put_int(&bytes, 1, 1);
		put_int(&bytes, 0, 16);
		put_text(&bytes, bad[i], 1);
		CHECK(!record__device(slice_of(&bytes), &record));
	}
}


static void test_a_placeholder_without_a_value_is_unsound(void)
{
	struct a_rule rule = RULE("r", EFFECT_ALLOW, 1, "a/\xff\x01");
	struct device_record record = {.value_count = 0};
	struct bytes profile = a_profile(&rule, 1);
	struct grants *grants;

	CHECK(grants_of(slice_of(&profile), &record, &grants) == REASON_STORE);
	CHECK(grants == NULL);
	rule.topic_len = 3; /* the placeholder's number is missing */
	profile = a_profile(&rule, 1);
	CHECK(grants_of(slice_of(&profile), &record, &grants) == REASON_STORE);
	rule = (struct a_rule)RULE("r", EFFECT_ALLOW, 1, "a/#/b");
	profile = a_profile(&rule, 1);
	CHECK(grants_of(slice_of(&profile), &record, &grants) == REASON_STORE);
}


static bool utc(void *context, uint32_t zone, int64_t at, int32_t *offset)
{
	(void)at;
	(void)zone;
	*offset = context ? *(int32_t *)context : 0;
	return true;
}


static bool no_zone(void *context, uint32_t zone, int64_t at, int32_t *offset)
{
	(void)context;
	(void)at;
	(void)zone;
	(void)offset;
	return false;
}


static enum reason ask(const struct a_rule *rules, size_t count, enum access access, const char *topic,
		const struct moment *moment, zone_lookup zones, void *context)
{
	struct device_record record = {.value_count = 0};
	struct bytes profile = a_profile(rules, count);
	struct grants *grants;
	struct decision decision;

	CHECK(grants_of(slice_of(&profile), &record, &grants) == REASON_NONE);
	decision = decide__by(grants, access, topic, strlen(topic), moment, zones, context);
	free(grants);
	return decision.reason;
}


static void test_windows_to_the_second(void)
{
	static const struct {
		struct window window;
		int64_t at;
		int32_t offset;
		bool open;
	} cases[] = {
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY + 6 * HOUR - 1, 0, false},
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY + 6 * HOUR, 0, true},
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY + 22 * HOUR - 1, 0, true},
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY + 22 * HOUR, 0, false},
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY + 6 * HOUR - 1, 1, true},
		{{6 * HOUR, 22 * HOUR, 1, 0x1F}, MONDAY - 2 * DAY + 12 * HOUR, 0, false}, /* a Saturday */
		{{0, DAY, 1, 0x40}, MONDAY - 1, 0, true}, /* a Sunday's last second */
		{{0, DAY, 1, 0x40}, MONDAY, 0, false},
		{{22 * HOUR, 6 * HOUR, 1, 0x01}, MONDAY + DAY + 6 * HOUR - 1, 0, true}, /* began on Monday */
		{{22 * HOUR, 6 * HOUR, 1, 0x01}, MONDAY + DAY + 6 * HOUR, 0, false},
		{{22 * HOUR, 6 * HOUR, 1, 0x01}, MONDAY + HOUR, 0, false}, /* began on Sunday */
		{{22 * HOUR, 6 * HOUR, 1, 0x40}, MONDAY + HOUR, 0, true},
		{{HOUR, HOUR, 1, 0x01}, MONDAY + DAY + HOUR - 1, 0, true}, /* all round the clock */
		{{HOUR, HOUR, 1, 0x01}, MONDAY + DAY + HOUR, 0, false},
		{{0, DAY, 1, 0x08}, -1, 1, true}, /* before the epoch, and after it on the wall: a Thursday */
		{{0, DAY, 1, 0x04}, -1, 0, true}, /* a Wednesday */
	};
	size_t i;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		struct a_rule rule = RULE("r", EFFECT_ALLOW, 1, "a");
		struct moment moment = {.has_time = true, .now = cases[i].at};
		int32_t offset = cases[i].offset;

		rule.window = &cases[i].window;
		CHECK(ask(&rule, 1, ACCESS_PUBLISH, "a", &moment, utc, &offset)
				== (cases[i].open ? REASON_NONE : REASON_NOT_ALLOWED));
	}
}


static void test_a_zone_that_cannot_be_read_denies(void)
{
	static const struct window window = {.days = 0x7F, .from = 0, .to = DAY, .zone = 1};
	struct a_rule rules[] = {RULE("allow", EFFECT_ALLOW, 1, "a"), RULE("deny", EFFECT_DENY, 1, "#")};
	struct moment moment = {.has_time = true, .now = MONDAY};

	rules[1].window = &window;
	CHECK(ask(rules, 2, ACCESS_PUBLISH, "a", &moment, no_zone, NULL) == REASON_STORE);
	rules[0].access = rules[1].access = 2;
	CHECK(ask(rules, 2, ACCESS_SUBSCRIBE, "a", &moment, no_zone, NULL) == REASON_STORE);
	CHECK(ask(rules, 2, ACCESS_DELIVER, "a", &moment, no_zone, NULL) == REASON_STORE);
}


static void test_zones(void)
{
	struct bytes zone = {.len = 0};
	int32_t offset;
	int64_t from, until;
	size_t len;

	put_int(&zone, 3, 4);
	put_int(&zone, (uint64_t)-62135596800, 8);
	put_int(&zone, 100, 4);
	put_int(&zone, 1000, 8);
	put_int(&zone, (uint32_t)-3600, 4);
	put_int(&zone, 2000, 8);
	put_int(&zone, 7200, 4);
	CHECK(record__zone(slice_of(&zone), 999, &offset, &from, &until) && offset == 100 && until == 1000);
	CHECK(record__zone(slice_of(&zone), 1000, &offset, &from, &until) && offset == -3600 && from == 1000 && until == 2000);
	CHECK(record__zone(slice_of(&zone), 2000, &offset, &from, &until) && offset == 7200 && until == BEDNET_NEVER);
	CHECK(!record__zone(slice_of(&zone), -62135596801, &offset, &from, &until));
	for(len = 0; len < zone.len; len++){
		CHECK(!record__zone((struct slice){zone.at, len}, 1500, &offset, &from, &until));
	}
}


static void test_addresses(void)
{
	static const struct {
		const char *text, *network;
		uint8_t prefix;
		bool inside;
	} cases[] = {
		{"10.20.1.5", "10.20.0.0", 16, true}, {"10.21.0.0", "10.20.0.0", 16, false}, {"10.20.1.5", "10.20.1.4", 31, true},
		{"10.20.1.6", "10.20.1.4", 31, false}, {"1.2.3.4", "0.0.0.0", 0, true}, {"::ffff:10.20.1.5", "10.20.0.0", 16, true},
		{"::ffff:10.20.1.5", "::", 0, false}, {"2001:db8::1", "2001:db8::", 32, true}, {"2001:db9::1", "2001:db8::", 32, false},
		{"2001:db8::1", "0.0.0.0", 0, false}, {"fe80::1", "fe80::", 10, true}, {"fec0::1", "fe80::", 10, false},
	};
	struct moment moment;
	size_t i;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		struct a_rule rule = RULE("r", EFFECT_ALLOW, 1, "a");
		struct network network = {.prefix = cases[i].prefix};

		CHECK(decide__address(cases[i].network, &moment));
		network.family = moment.family;
		memcpy(network.address, moment.address, sizeof(network.address));
		rule.network = &network;
		memset(&moment, 0, sizeof(moment));
		CHECK(decide__address(cases[i].text, &moment));
		CHECK(ask(&rule, 1, ACCESS_PUBLISH, "a", &moment, utc, NULL) == (cases[i].inside ? REASON_NONE : REASON_NOT_ALLOWED));
	}
	CHECK(!decide__address("somewhere", &moment) && moment.family == 0);
	CHECK(!decide__address("10.0.0.1:1883", &moment) && moment.family == 0);
	CHECK(!decide__address(NULL, &moment) && moment.family == 0);
}


static void test_what_is_not_known_counts_against(void)
{
	static const struct network network = {.family = 4, .prefix = 0};
	struct a_rule rules[] = {RULE("allow", EFFECT_ALLOW, 1, "a"), RULE("deny", EFFECT_DENY, 1, "b"),
			RULE("allow-b", EFFECT_ALLOW, 1, "b")};
	struct moment nowhere = {.has_time = true}, somewhere = {.has_time = true, .family = 6};

	rules[0].network = rules[1].network = &network;
	CHECK(ask(rules, 3, ACCESS_PUBLISH, "a", &nowhere, utc, NULL) == REASON_NOT_ALLOWED);
	CHECK(ask(rules, 3, ACCESS_PUBLISH, "b", &nowhere, utc, NULL) == REASON_DENIED);
	CHECK(ask(rules, 3, ACCESS_PUBLISH, "a", &somewhere, utc, NULL) == REASON_NOT_ALLOWED);
	CHECK(ask(rules, 3, ACCESS_PUBLISH, "b", &somewhere, utc, NULL) == REASON_NONE);
}


static void test_passwords(void)
{
	struct bytes bytes = a_device(FLAG_PASSWORD, 0), other = a_device(FLAG_CERTIFICATE, 0);
	struct device_record record;

	CHECK(record__device(slice_of(&bytes), &record));
	CHECK(secret__password(&record, "secret"));
	CHECK(!secret__password(&record, "Secret") && !secret__password(&record, "") && !secret__password(NULL, "secret"));
	CHECK(record__device(slice_of(&other), &record));
	CHECK(!secret__password(&record, "secret"));
	bytes.at[bytes.len - 64 - 1 - 5 - 4] = 0xFF; /* the lowest byte of the iterations */
	bytes.at[bytes.len - 64 - 1 - 5 - 3] = 0xFF;
	CHECK(!record__device(slice_of(&bytes), &record));
}


static void test_throttle(void)
{
	static struct throttle throttle;
	struct moment here = {.family = 4, .address = {10, 0, 0, 1}}, there = {.family = 4, .address = {10, 0, 0, 2}};
	struct moment six = {.family = 6, .address = {0x20, 1}}, neighbour = six, far = six;
	int i;

	neighbour.address[15] = 9; /* of the same network */
	far.address[7] = 1;
	CHECK(throttle__init(&throttle, 3));
	for(i = 0; i < 3; i++){
		CHECK(!throttle__blocked(&throttle, &here, "temp-1", 100));
		throttle__failed(&throttle, &here, "temp-1", 100);
	}
	CHECK(throttle__blocked(&throttle, &here, "temp-1", 100) && throttle__blocked(&throttle, &here, "temp-1", 119));
	CHECK(!throttle__blocked(&throttle, &here, "temp-1", 120));
	CHECK(!throttle__blocked(&throttle, &here, "temp-2", 100) && !throttle__blocked(&throttle, &there, "temp-1", 100));
	/* Who has proved that name is somebody else, and many who have proved theirs do not stop one another. */
	CHECK(!throttle__blocked(&throttle, NULL, "temp-1", 100));
	for(i = 0; i < 3 * THROTTLE_ADDRESS_FACTOR + 3; i++){
		char id[BEDNET_ID_MAX + 1];

		(void)snprintf(id, sizeof(id), "proved-%d", i / 3);
		CHECK(!throttle__blocked(&throttle, NULL, id, 100));
		throttle__failed(&throttle, NULL, id, 100);
	}
	CHECK(throttle__blocked(&throttle, NULL, "proved-0", 100) && !throttle__blocked(&throttle, NULL, "proved-99", 100));
	CHECK(!throttle__blocked(&throttle, &there, "proved-0", 100));
	throttle__succeeded(&throttle, &here, "temp-1");
	CHECK(!throttle__blocked(&throttle, &here, "temp-1", 100));
	/* Ten times as many from one address, under whatever names, stop it. */
	for(i = 0; i < 30; i++){
		char id[20];

		(void)snprintf(id, sizeof(id), "guess-%d", i);
		throttle__failed(&throttle, &six, id, 100);
	}
	/* And nobody beside it: on a plant's network all addresses have the same prefix. */
	CHECK(throttle__blocked(&throttle, &six, "temp-1", 100) && !throttle__blocked(&throttle, &neighbour, "temp-1", 100));
	CHECK(!throttle__blocked(&throttle, &far, "temp-1", 100) && !throttle__blocked(&throttle, &there, "temp-1", 100));
	/* Very many addresses fill the table, and block nobody else. */
	for(i = 0; i < 50000; i++){
		struct moment from = {.family = 4, .address = {11, (uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i}};

		throttle__failed(&throttle, &from, "temp-1", 200);
		throttle__failed(&throttle, &from, "temp-1", 200);
		throttle__failed(&throttle, &from, "temp-1", 200);
	}
	for(i = 0; i < 1000; i++){
		struct moment from = {.family = 4, .address = {12, 0, (uint8_t)(i >> 8), (uint8_t)i}};

		CHECK(!throttle__blocked(&throttle, &from, "temp-1", 200));
	}
}


static void test_keys_of_nobody(void)
{
	static const uint8_t one[SECRET_KEY_LEN] = {1}, other[SECRET_KEY_LEN] = {2};
	uint8_t a[SECRET_KEY_LEN], b[SECRET_KEY_LEN];

	CHECK(secret__nobodys_key(one, "temp-1", a) && secret__nobodys_key(one, "temp-1", b) && !memcmp(a, b, sizeof(a)));
	CHECK(secret__nobodys_key(one, "temp-2", b) && memcmp(a, b, sizeof(a)));
	CHECK(secret__nobodys_key(other, "temp-1", b) && memcmp(a, b, sizeof(a)));
	CHECK(secret__nobodys_key(one, "", b));
}


static void test_audit(void)
{
	static char huge[70000];
	char line[AUDIT_LINE], small[16];
	struct audit_event event = {.event = "disconnected", .action = "subscribe", .reason = REASON_CERTIFICATE_REVOKED};

	memset(huge, '\xff', sizeof(huge) - 1);
	event.device = event.client_id = event.address = event.topic = event.rule = huge;
	event.rule_len = 255;
	CHECK(audit__format(&event, UINT64_MAX, line) < AUDIT_LINE - 1 && line[strlen(line) - 1] == '}');
	CHECK(audit__escape("abcdefghijklmnopqrst", 20, small, sizeof(small)) == 16);
	CHECK(memcmp(small, "abcdefghij\\u2026", 16) == 0);
	CHECK(audit__escape("abcdefghij", 10, small, sizeof(small)) == 10 && small[9] == 'j');
	CHECK(audit__escape("a\"\\\n\x7f", 5, line, sizeof(line)) == 1 + 2 + 2 + 6 + 6);
	CHECK(audit__escape("\xf0\x9f\x98\x80", 4, line, sizeof(line)) == 12 && memcmp(line, "\\ud83d\\ude00", 12) == 0);
	CHECK(audit__escape("\xc0\xaf\xed\xa0\x80", 5, line, sizeof(line)) == 5 * 6); /* over-long, and a surrogate */
}


/* How many lines come of so many events in one second, from senders that are called NAME-0, NAME-1, ... */
static unsigned int written(struct audit *audit, enum audit_kind kind, const char *device, const char *network,
		unsigned int senders, unsigned int events, int64_t now)
{
	unsigned int i, count = 0;

	for(i = 0; i < events; i++){
		char name[100], address[100];
		struct audit_event event = {.device = name, .address = address};
		uint64_t suppressed;

		(void)snprintf(name, sizeof(name), "%s-%u", device, i % senders);
		(void)snprintf(address, sizeof(address), "%s%u", network, i % senders);
		count += audit__may(audit, kind, &event, now, &suppressed);
	}
	return count;
}


static void test_lines_of_the_audit_are_shared(void)
{
	static struct audit audit;
	struct audit_event event = {.device = "temp-1", .address = "10.0.0.1"};
	uint64_t suppressed = 99;

	CHECK(audit__init(&audit, 40));
	/* One device gets a quarter, whatever its address; the lines left out are told once. */
	CHECK(written(&audit, AUDIT_ASK, "noisy", "10.0.0.", 1, 1000, 1) == 10);
	CHECK(audit__may(&audit, AUDIT_ASK, &event, 1, &suppressed) && suppressed == 990);
	CHECK(audit__may(&audit, AUDIT_ASK, &event, 1, &suppressed) && suppressed == 0);
	CHECK(written(&audit, AUDIT_ASK, "many", "10.0.0.", 100, 100, 1) == 28); /* the kind's whole rate */
	CHECK(written(&audit, AUDIT_DELIVER, "noisy", "10.0.0.", 1, 1000, 1) == 10); /* a kind of its own */
	CHECK(written(&audit, AUDIT_ASK, "noisy", "10.0.0.", 1, 1000, 2) == 10);

	/* Of strangers the address counts, not the name, which they choose: a quarter, and half for a network. */
	CHECK(written(&audit, AUDIT_CONNECT, "x", "10.0.0.", 1, 1000, 1) == 10);
	CHECK(written(&audit, AUDIT_CONNECT, "x", "10.0.0.", 200, 1000, 1) == 10);
	CHECK(written(&audit, AUDIT_CONNECT, "x", "10.0.1.", 200, 1000, 1) == 20);
	CHECK(written(&audit, AUDIT_CONNECT, "x", "2001:db8::", 200, 1000, 2) == 20);
	event.address = "2001:db8:0:1::1";
	CHECK(audit__may(&audit, AUDIT_CONNECT, &event, 2, &suppressed) && suppressed == 980);
	event.address = NULL; /* all of whom nothing is known are one */
	CHECK(audit__may(&audit, AUDIT_CONNECT, &event, 2, &suppressed));
	event.device = NULL;
	CHECK(audit__may(&audit, AUDIT_ASK, &event, 3, &suppressed));

	/* With more senders than there is room for, the rate holds, and in the next second all is well again. */
	CHECK(audit__init(&audit, 10000));
	CHECK(written(&audit, AUDIT_ASK, "flood", "10.0.0.", 20000, 20000, 7) == 10000);
	CHECK(written(&audit, AUDIT_ASK, "noisy", "10.0.0.", 1, 5000, 8) == 2500);
	/* However low the rate, one line is everybody's. */
	CHECK(audit__init(&audit, 1));
	CHECK(written(&audit, AUDIT_ASK, "noisy", "10.0.0.", 1, 10, 9) == 1);
}


static bool named(const char *const *names, size_t count, int type, size_t len)
{
	X509_NAME *name = X509_NAME_new();
	char out[BEDNET_ID_MAX + 1];
	size_t i;
	bool found;

	for(i = 0; i < count; i++){
		CHECK(X509_NAME_add_entry_by_txt(name, "CN", type, (const unsigned char *)names[i],
				(int)(len ? len : strlen(names[i])), -1, 0) == 1);
	}
	found = cert__name(name, out);
	CHECK(!found || strcmp(out, names[0]) == 0);
	X509_NAME_free(name);
	return found;
}


static void test_certificate_names(void)
{
	static const char *const good[] = {"temp-1", "temp-2"}, *const nul[] = {"temp-1\0x"}, *const path[] = {"a/b"};

	CHECK(named(good, 1, MBSTRING_ASC, 0) && named(good, 1, V_ASN1_UTF8STRING, 0));
	CHECK(named(good, 1, V_ASN1_PRINTABLESTRING, 0));
	CHECK(!named(good, 2, MBSTRING_ASC, 0) && !named(good, 0, MBSTRING_ASC, 0));
	CHECK(!named(nul, 1, V_ASN1_UTF8STRING, 8) && !named(path, 1, MBSTRING_ASC, 0));
	CHECK(!named(good, 1, V_ASN1_BMPSTRING, 0) && !named(good, 1, V_ASN1_T61STRING, 0));
}


static void sink_device(void *context, const char *id, size_t len)
{
	sessions__changed(context, id, len);
}


static void sink_issuers(void *context)
{
	sessions__issuers_changed(context);
}


static void sink_all(void *context)
{
	sessions__all_changed(context);
}


static void test_sessions(void)
{
	struct writer writer = write_store();
	struct store store;
	struct sessions sessions;
	struct change_sink sink = {sink_device, sink_issuers, sink_all, &sessions};
	struct moment from = {.family = 4};
	struct certificate certificate = {.id = "temp-1", .serial = {9}, .serial_len = 1, .not_after = 1500};
	struct session *session;
	enum reason why = REASON_NONE;
	char text[512];
	int clients[3];
	bool more;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	CHECK(sessions__init(&sessions, &store));

	/* One of its own, which a client at the same address does not inherit; taken away twice, and once for nobody. */
	session = sessions__add(&sessions, &clients[0], "temp-1", METHOD_CERTIFICATE, &certificate, &from);
	CHECK(session && sessions__check(&sessions, session, 1000) == REASON_NONE);
	CHECK(sessions__find(&sessions, &clients[0], "temp-1") == session);
	CHECK(!sessions__find(&sessions, &clients[0], "temp-2") && !sessions__find(&sessions, &clients[1], "temp-1"));
	sessions__remove(&sessions, &clients[0]);
	sessions__remove(&sessions, &clients[0]);
	CHECK(sessions.count == 0 && sessions.device_count == 0 && sessions.heap_count == 0 && !sessions.all);

	/* Ends come in their order: the certificate's at 1501, the device's at 2000. */
	CHECK(sessions__check(&sessions, sessions__add(&sessions, &clients[1], "temp-2", METHOD_CERTIFICATE, NULL, &from), 1)
			== REASON_NONE);
	session = sessions__add(&sessions, &clients[0], "temp-1", METHOD_CERTIFICATE, &certificate, &from);
	CHECK(sessions__check(&sessions, session, 1500) == REASON_NONE && sessions.heap_count == 2);
	CHECK(sessions__next_due(&sessions, 1500, &why, &more) == NULL && !more);
	CHECK(sessions__next_due(&sessions, 1501, &why, &more) == session && why == REASON_CERTIFICATE_TIME);
	CHECK(sessions__next_due(&sessions, 1999, &why, &more) == NULL); /* it is dead, and not told again */
	CHECK(sessions__next_due(&sessions, 1999, &why, &more) == NULL && !more);
	session = sessions__next_due(&sessions, 2000, &why, &more);
	CHECK(session && session->client == &clients[1] && why == REASON_UNTIL);
	CHECK(sessions__next_due(&sessions, 3000, &why, &more) == NULL);
	sessions__remove(&sessions, &clients[0]);
	sessions__remove(&sessions, &clients[1]);

	/* A change is felt by its device. */
	session = sessions__add(&sessions, &clients[0], "temp-1", METHOD_PASSWORD, NULL, &from);
	CHECK(sessions__check(&sessions, session, 1) == REASON_NONE && !store__moved(&store));
	write_begin(&writer);
	write_device(&writer, "temp-1", FLAG_REVOKED, 0);
	write_commit(&writer);
	CHECK(store__moved(&store) && store__refresh(&store, &sink) && !store__moved(&store));
	CHECK(sessions__next_due(&sessions, 1, &why, &more) == session && why == REASON_REVOKED && session->dead);
	CHECK(sessions__next_due(&sessions, 1, &why, &more) == NULL && more);
	CHECK(sessions__next_due(&sessions, 1, &why, &more) == NULL && !more);
	CHECK(sessions__check(&sessions, session, 1) == REASON_REVOKED);
	sessions__remove(&sessions, &clients[0]);

	/* A serial number is looked up again by all. */
	session = sessions__add(&sessions, &clients[0], "temp-2", METHOD_CERTIFICATE, &certificate, &from);
	CHECK(sessions__check(&sessions, session, 1) == REASON_NONE);
	write_begin(&writer);
	write_record(&writer, "revoked", "\x09", 1, "\x01", 1);
	write_change(&writer, 2, "\x09");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink));
	CHECK(sessions__next_due(&sessions, 1, &why, &more) == session && why == REASON_CERTIFICATE_REVOKED);
	sessions__free(&sessions);

	/* Of one who has yet to prove that it has the key nothing is read but its end, which is kept. */
	CHECK(sessions__init(&sessions, &store));
	session = sessions__add(&sessions, &clients[0], "temp-2", METHOD_PSK, NULL, &from);
	CHECK(session && sessions__expect(&sessions, session, 2000) && !session->device->grants && session->device->stale);
	CHECK(sessions__next_due(&sessions, 1999, &why, &more) == NULL && !more && !session->device->grants);
	CHECK(sessions__next_due(&sessions, 2000, &why, &more) == session && why == REASON_METHOD);
	sessions__free(&sessions);

	/* Handshakes with a pre-shared key that were heard of no more do not pile up. */
	CHECK(sessions__init(&sessions, &store));
	{
		static char many[SESSIONS_PENDING + 100], one[SESSIONS_PENDING_SAME + 1];
		size_t i;

		for(i = 0; i < sizeof(many); i++){
			struct moment somewhere = {.family = 4, .address = {10, 0, (uint8_t)(i >> 4)}};

			CHECK(sessions__add(&sessions, &many[i], "temp-3", METHOD_PSK, NULL, &somewhere));
		}
		CHECK(sessions.count == SESSIONS_PENDING && sessions.pending == SESSIONS_PENDING);
		/* Who makes very many makes room for them out of its own. */
		for(i = 0; i < sizeof(one); i++){
			CHECK(sessions__add(&sessions, &one[i], "temp-3", METHOD_PSK, NULL, &from));
		}
		CHECK(sessions.pending == SESSIONS_PENDING && !sessions__find(&sessions, &one[0], "temp-3"));
		CHECK(sessions__find(&sessions, &one[1], "temp-3") && sessions__find(&sessions, &many[200], "temp-3"));
		for(i = 0; i < sizeof(one); i++){
			sessions__remove(&sessions, &one[i]);
		}
		CHECK(sessions.pending == SESSIONS_PENDING - SESSIONS_PENDING_SAME);
		CHECK(!sessions__find(&sessions, &many[0], "temp-3"));
		session = sessions__find(&sessions, &many[200], "temp-3");
		sessions__confirm(&sessions, session);
		sessions__confirm(&sessions, session);
		CHECK(sessions.pending == SESSIONS_PENDING - SESSIONS_PENDING_SAME - 1);
		for(i = 0; i < sizeof(many); i++){
			sessions__remove(&sessions, &many[i]);
		}
		CHECK(sessions.count == 0 && sessions.pending == 0 && !sessions.oldest && !sessions.newest);
	}
	sessions__free(&sessions);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


#define SCOPE ",\"scope\":\"W1siIyIsWyJwdWIiXV1d\"" /* [["#",["pub"]]] */


static enum reason check_token(struct store *store, struct token_keys *cache, const char *text, struct token **out)
{
	struct token_question question = {.store = store, .keys = cache, .audience = "mqtts://own", .now = TOKEN_TIME};
	enum reason reason;

	*out = token__read(text, strlen(text), &reason);
	if(*out){
		CHECK(reason == REASON_NONE && store__begin(store));
		reason = token__check(*out, &question);
		store__end(store);
		if(reason != REASON_NONE){
			token__free(*out);
			*out = NULL;
		}
	}
	return reason;
}


static enum reason reason_of(struct store *store, struct token_keys *cache, const char *text)
{
	struct token *token;
	enum reason reason = check_token(store, cache, text, &token);

	CHECK(ERR_peek_error() == 0); /* or the broker takes it for one of somebody's connection */
	token__free(token);
	return reason;
}


static void test_base64url(void)
{
	static const struct {
		const char *text, *bytes; /* NULL: none */
	} cases[] = {
		{"", ""}, {"Zg", "f"}, {"Zm8", "fo"}, {"Zm9v", "foo"}, {"Zm9vYg", "foob"}, {"-_8", "\xfb\xff"},
		{"Z", NULL}, {"Zg==", NULL}, {"Zh", NULL}, {"Zm9", NULL}, {"+/8", NULL}, {"Z g", NULL}, {"Zm9vY", NULL},
	};
	uint8_t out[16];
	size_t i, len;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		const bool good = token__decode(cases[i].text, strlen(cases[i].text), out, &len);

		CHECK(good == (cases[i].bytes != NULL));
		CHECK(!good || (len == strlen(cases[i].bytes) && memcmp(out, cases[i].bytes, len) == 0));
	}
	for(i = 0; i < 256; i++){
		const char text[] = {'A', 'A', 'A', (char)i};
		const char *found = i ? strchr(digits, (int)i) : NULL;
		const bool good = token__decode(text, sizeof(text), out, &len);

		CHECK(good == (found != NULL) && (!good || (len == 3 && out[2] == found - digits)));
	}
}


static void test_cut_records_of_issuers_do_not_parse(void)
{
	struct bytes issuer = an_issuer(ISS, ISSUER_ROLES | ISSUER_AIF), key = a_key(keys[KEY_EC], "1");
	struct issuer_record read;
	struct key_record read_key;
	int64_t seconds;
	size_t len;

	CHECK(record__issuer(slice_of(&issuer), &read) && read.leeway == 5 && read.mapping_count == 2);
	for(len = 0; len <= issuer.len + 1; len++){
		uint8_t *copy = calloc(1, len + 1);

		memcpy(copy, issuer.at, len < issuer.len ? len : issuer.len);
		CHECK(record__issuer((struct slice){copy, len}, &read) == (len == issuer.len));
		free(copy);
	}
	for(len = 0; len <= key.len + 1; len++){
		uint8_t *copy = calloc(1, len + 1);

		memcpy(copy, key.at, len < key.len ? len : key.len);
		CHECK(record__key((struct slice){copy, len}, &read_key) == (len == key.len));
		free(copy);
	}
	for(len = 0; len <= 9; len++){
		CHECK(record__seconds((struct slice){issuer.at, len}, &seconds) == (len == 8));
	}
	issuer.at[1] = 16;
	CHECK(!record__issuer(slice_of(&issuer), &read));
	issuer.at[1] = ISSUER_ROLES | ISSUER_SPACED;
	CHECK(record__issuer(slice_of(&issuer), &read) && read.flags == (ISSUER_ROLES | ISSUER_SPACED));
	issuer = an_issuer(ISS, ISSUER_AIF);
	issuer.at[1] = ISSUER_AIF | ISSUER_SPACED; /* of what, without roles? */
	CHECK(!record__issuer(slice_of(&issuer), &read));
	issuer = an_issuer(ISS, ISSUER_ROLES);
	issuer.at[1] = ISSUER_AIF; /* there is a claim for roles */
	CHECK(!record__issuer(slice_of(&issuer), &read));
	key.at[1] = 3;
	CHECK(!record__key(slice_of(&key), &read_key));
}


static void test_tokens(void)
{
	static const char *const kinds[] = {"ES256", "EdDSA", "RS256"};
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	struct token *token;
	struct token_question question = {.store = &store, .audience = "mqtts://own", .now = TOKEN_TIME};
	char text[512], big[9000];
	size_t i, size;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	CHECK(check_token(&store, &cache, a_token("tok-1", TOKEN_TIME + 10, SCOPE), &token) == REASON_NONE);
	CHECK(strcmp(token->id, "tok-1") == 0 && token->end == TOKEN_TIME + 15 && token->limited && !token->made);
	CHECK(token__permits(token, ACCESS_PUBLISH, "a/b", 3) && !token__permits(token, ACCESS_PUBLISH, "$SYS/a", 6));
	CHECK(!token__permits(token, ACCESS_DELIVER, "a/b", 3) && !token__permits(token, ACCESS_SUBSCRIBE, "a/b", 3));
	token__free(token);
	for(i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++){
		char header[128], payload[512];

		(void)snprintf(header, sizeof(header), "{\"alg\":\"%s\",\"kid\":\"%c\"}", kinds[i], (int)('1' + i));
		(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS "\",\"aud\":[\"x\",\"mqtts://own\"],\"iat\":1e5,"
				"\"exp\":%d.5,\"sub\":\"tok-1\"" SCOPE "}", TOKEN_TIME + 1);
		CHECK(reason_of(&store, &cache, a_token_of(header, payload, keys[i])) == REASON_NONE);
		CHECK(reason_of(&store, &cache, a_token_of(header, payload, keys[(i + 1) % 3])) == REASON_TOKEN_SIGNATURE);
	}
	/* To the second, leeway included. */
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME - 4, SCOPE)) == REASON_NONE);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME - 5, SCOPE)) == REASON_TOKEN_EXPIRED);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 3600, SCOPE)) == REASON_NONE);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 3601, SCOPE)) == REASON_TOKEN_LIFETIME);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 9, SCOPE ",\"nbf\":100005")) == REASON_NONE);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 9, SCOPE ",\"nbf\":100005.1")) == REASON_TOKEN_EARLY);
	CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 9, "")) == REASON_TOKEN_SCOPE);
	CHECK(reason_of(&store, &cache, a_token("t/k", TOKEN_TIME + 9, SCOPE)) == REASON_TOKEN_CLAIMS);
	CHECK(reason_of(&store, &cache, a_token("bednet-probe", TOKEN_TIME + 9, SCOPE)) == REASON_TOKEN_CLAIMS);
	CHECK(reason_of(&store, &cache, "a.b") == REASON_TOKEN_MALFORMED && reason_of(&store, &cache, "..") == REASON_TOKEN_MALFORMED);
	memset(big, 'A', sizeof(big));
	big[100] = big[200] = '.';
	big[TOKEN_MAX + 1] = '\0';
	CHECK(reason_of(&store, &cache, big) == REASON_TOKEN_MALFORMED);
	/* A device that the store does not have has the rights of its roles. */
	CHECK(check_token(&store, &cache, a_token_of("{\"alg\":\"ES256\",\"kid\":\"1\"}", "{\"iss\":\"" ISS_FOREIGN "\",\"sub\":\"1\","
			"\"aud\":\"mqtts://plant\",\"iat\":100000,\"exp\":100009,\"hall\":\"h\",\"a\":{\"roles\":\"sensor\",\"desk\":\"d\"}}",
			keys[KEY_EC]), &token) == REASON_NONE);
	CHECK(token->made && token->grants->count == 2 && !token->limited && strcmp(token->id, "x-1") == 0);
	/* What it has of rights counts for what is kept of it, and once however often it is checked. */
	size = token->size;
	CHECK(size > sizeof(*token) + token->grants->size);
	question.keys = &cache;
	CHECK(store__begin(&store) && token__check(token, &question) == REASON_NONE && token->size == size);
	store__end(&store);
	CHECK(memcmp(token->grants->list[0].filter, "sensors/x-1/#", 13) == 0);
	CHECK(memcmp(token->grants->list[1].filter, "halls/h/d", 9) == 0);
	token__free(token);
	/* Where nobody has said so, a text is one role. */
	CHECK(reason_of(&store, &cache, a_token_of("{\"alg\":\"ES256\",\"kid\":\"1\"}", "{\"iss\":\"" ISS_FOREIGN "\",\"sub\":\"1\","
			"\"aud\":\"mqtts://plant\",\"iat\":100000,\"exp\":100009,\"hall\":\"h\",\"a\":{\"roles\":\"a sensor\",\"desk\":\"d\"}}",
			keys[KEY_EC])) == REASON_TOKEN_CLAIMS);
	/* More keys than are kept ready do no harm. */
	for(i = 0; i < 2 * TOKEN_KEYS; i++){
		CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 9, SCOPE)) == REASON_NONE);
		cache.entries[i % TOKEN_KEYS].print[0] ^= 1;
	}
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


#define HEADER "{\"alg\":\"ES256\",\"typ\":\"at+jwt\",\"kid\":\"1\"}"


/* Of a token with one claim more. */
static enum reason reason_of_claim(struct store *store, struct token_keys *cache, const char *claim)
{
	char claims[4096];

	(void)snprintf(claims, sizeof(claims), SCOPE ",\"a\":%s", claim);
	return reason_of(store, cache, a_token("tok-1", TOKEN_TIME + 10, claims));
}


static void test_times_that_are_none(void)
{
	static const struct {
		const char *nbf;
		enum reason reason;
	} cases[] = {
		{"0", REASON_NONE}, {"0.0", REASON_NONE}, {"-0.0", REASON_NONE}, {"-0", REASON_TOKEN_CLAIMS}, {"-1", REASON_TOKEN_CLAIMS},
		{"-1.5", REASON_TOKEN_CLAIMS}, {"9007199254740992", REASON_TOKEN_EARLY}, {"9007199254740993", REASON_TOKEN_CLAIMS},
		{"9007199254740992.0", REASON_TOKEN_EARLY}, {"9007199254740994.0", REASON_TOKEN_CLAIMS},
		{"9223372036854775807", REASON_TOKEN_CLAIMS}, {"9223372036854775808", REASON_TOKEN_CLAIMS},
		{"18446744073709551615", REASON_TOKEN_CLAIMS}, {"18446744073709551616", REASON_TOKEN_CLAIMS},
		{"-9223372036854775809", REASON_TOKEN_CLAIMS}, {"1e300", REASON_TOKEN_CLAIMS}, {"\"0\"", REASON_TOKEN_CLAIMS},
		{"null", REASON_TOKEN_CLAIMS}, {"[0]", REASON_TOKEN_CLAIMS}, {"true", REASON_TOKEN_CLAIMS},
	};
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	char text[512], claims[256];
	size_t i;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		(void)snprintf(claims, sizeof(claims), SCOPE ",\"nbf\":%s", cases[i].nbf);
		CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 10, claims)) == cases[i].reason);
	}
	store__close(&store);
	token__forget_keys(&cache);
	mdb_env_close(writer.env);
	remove_store();
}


/* What we have no memory for is not the token's fault, nor is it let in. */
static void test_a_token_that_there_is_no_memory_for(void)
{
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	struct token_question question = {.store = &store, .keys = &cache, .audience = "mqtts://own", .now = TOKEN_TIME};
	char text[512];
	long at, refused = 0;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(at = 0; at <= allocations || at == 0; at++){
		enum reason reason;
		struct token *token;

		strcpy(text, a_token("tok-1", TOKEN_TIME + 10, SCOPE));
		token = token__read(text, strlen(text), &reason);
		CHECK(token && store__begin(&store));
		allocations = 0;
		fail_at = at;
		reason = token__check(token, &question);
		fail_at = -1;
		CHECK(reason == REASON_INTERNAL || reason == REASON_NONE);
		refused += reason == REASON_INTERNAL;
		store__end(&store);
		token__free(token);
		token__forget_keys(&cache);
	}
	CHECK(refused >= 4); /* header, claims, scope, and the rights that come of it */
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


static void test_json_of_tokens(void)
{
	static const char *const good[] = {
		"[\"\\u00e4\",\"\xc3\xa4\",-0,1e3,18446744073709551616,null,true,{}]", "{\"b\":1,\"c\":{\"b\":1}}",
		"[[[[[[[]]]]]]]", /* with the claims themselves, eight */
		"\"[[[[[[[[[\"",
	};
	static const char *const bad[] = {
		"{\"b\":1,\"b\":1}", "[{\"c\":1,\"b\":1,\"\\u0062\":1}]", "{\"\":1,\"\":1}", "\"\\u0000\"", "[{\"b\\u0000\":1}]",
		"[[[[[[[[]]]]]]]]", "{\"b\":[[[[[[[]]]]]]]}", "\"\\ud800\"", "\"\xed\xa0\x80\"", "\"\xff\"", "\"\t\"", "[1,]", "[01]", "[.5]", "[NaN]",
		"1e999", "{b:1}", "'b'", "[/**/]", "1 2", "\"\\x41\"",
	};
	static const char *const headers[] = {
		"{\"alg\":\"ES256\",\"alg\":\"ES256\",\"kid\":\"1\"}", "{\"alg\":\"ES256\",\"kid\":\"1\\u0000\"}",
		"{\"alg\":\"ES256\",\"a\":[[[[[[[[]]]]]]]]}", "\"ES256\"", "5", "null", "[]", "",
	};
	static const char *const payloads[] = {
		"\"a\"", "5", "null", "true", "[]", "", "{\n  \"a\": 1,\n  \"a\": 1\n}", "{\n  \"a\": [[[[[[[[]]]]]]]]\n}", "\xef\xbb\xbf{}", "{}\v",
	};
	static const char *const scopes[] = {
		"5", "\"#\"", "null", "{}", "", "[[\"#\",[\"pub\"],[\"pub\"]]]", "[[\"#\",{\"pub\":1}]]", "[{\"#\":1,\"pub\":1}]", "[[\"#\",[]]]",
		"[[\"a\\u0000\",[\"pub\"]]]", "[[[[[[[[[]]]]]]]]]", "[[\"#\",[\"pub\"]]", "[[\"#\",[\"pub\"]]]]",
	};
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	char text[512], claim[2048];
	size_t i, count, len;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < sizeof(good) / sizeof(good[0]); i++){
		CHECK(reason_of_claim(&store, &cache, good[i]) == REASON_NONE);
	}
	for(i = 0; i < sizeof(bad) / sizeof(bad[0]); i++){
		CHECK(reason_of_claim(&store, &cache, bad[i]) == REASON_TOKEN_MALFORMED);
	}
	for(count = 64; count <= 65; count++){
		for(i = len = 0; i < count; i++){
			len += (size_t)snprintf(claim + len, sizeof(claim) - len, "%c\"b%zu\":0", i ? ',' : '{', i);
		}
		(void)snprintf(claim + len, sizeof(claim) - len, "}");
		CHECK(reason_of_claim(&store, &cache, claim) == (count == 64 ? REASON_NONE : REASON_TOKEN_MALFORMED));
	}
	for(i = 0; i < sizeof(headers) / sizeof(headers[0]); i++){
		CHECK(reason_of(&store, &cache, a_token_of(headers[i], "{}", keys[KEY_EC])) == REASON_TOKEN_MALFORMED);
	}
	for(i = 0; i < sizeof(payloads) / sizeof(payloads[0]); i++){
		CHECK(reason_of(&store, &cache, a_token_of(HEADER, payloads[i], keys[KEY_EC])) == REASON_TOKEN_MALFORMED);
	}
	for(i = 0; i < sizeof(scopes) / sizeof(scopes[0]); i++){
		strcpy(text, ",\"scope\":\"");
		encode(scopes[i], strlen(scopes[i]), text);
		strcat(text, "\"");
		CHECK(reason_of(&store, &cache, a_token("tok-1", TOKEN_TIME + 10, text)) == REASON_TOKEN_SCOPE);
	}
	/* Laid out over lines, which is read in another way. */
	(void)snprintf(claim, sizeof(claim), "{\n  \"iss\": \"" ISS "\",\n  \"aud\": [\n    \"mqtts://own\"\n  ],\n  \"iat\": %d,\n"
			"  \"exp\": %d,\n  \"sub\": \"tok-1\"" SCOPE "\n}\n", TOKEN_TIME, TOKEN_TIME + 10);
	CHECK(reason_of(&store, &cache, a_token_of(HEADER, claim, keys[KEY_EC])) == REASON_NONE);
	store__close(&store);
	token__forget_keys(&cache);
	mdb_env_close(writer.env);
	remove_store();
}


/* A token of ISS_CLOUD, with these claims beside the usual ones. */
static enum reason cloud_token(struct store *store, struct token_keys *cache, const char *claims, struct token **out)
{
	char payload[1024];

	(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS_CLOUD "\",\"aud\":\"mqtts://plant\",\"iat\":100000,"
			"\"exp\":100009,\"hall\":\"h\",\"a\":{\"desk\":\"d\"},%s}", claims);
	return check_token(store, cache, a_token_of("{\"alg\":\"ES256\",\"kid\":\"1\"}", payload, keys[KEY_EC]), out);
}


struct cloud_case {
	const char *claims; /* or a part of them */
	bool found; /* whether they lead to x-1 and its role; else to nobody */
};


/* Tokens of ISS_CLOUD with the claims of each case, between two texts. */
static void check_cloud(const struct cloud_case *cases, size_t count, const char *before, const char *after)
{
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	struct token *token;
	char text[512];
	size_t i;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < count; i++){
		enum reason reason;

		(void)snprintf(text, sizeof(text), "%s%s%s", before, cases[i].claims, after);
		reason = cloud_token(&store, &cache, text, &token);
		CHECK(reason == (cases[i].found ? REASON_NONE : REASON_TOKEN_CLAIMS));
		CHECK(!token || strcmp(token->id, "x-1") == 0);
		token__free(token);
	}
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


#define A_ROLE "\"r.a.b.roles\":\"sensor\""
#define AN_ID "\"k.io.sa.name\":\"1\""

/* "k.io.sa.name" leads to x-1, or nowhere. */
static void test_dotted_paths(void)
{
	static const struct cloud_case cases[] = {
		{"\"k.io\":{\"sa\":{\"name\":\"1\"}}", true},
		{"\"k.io.sa\":{\"name\":\"1\"}", true},
		{"\"k\":{\"io\":{\"sa\":{\"name\":\"1\"}}}", true},
		{"\"k\":{\"io.sa.name\":\"1\"}", true},
		{"\"k\":{\"io.sa\":{\"name\":\"1\"}}", true},
		{"\"k.io\":{\"sa.name\":\"1\"}", true},
		{AN_ID, true},
		/* The longest name wins, at each step ... */
		{"\"k\":{\"io\":{\"sa\":{\"name\":\"2\"}}},\"k.io\":{\"sa\":{\"name\":\"1\"}}", true},
		{"\"k.io\":{\"sa\":{\"name\":\"2\"},\"sa.name\":\"1\"}", true},
		{AN_ID ",\"k.io.sa\":{\"name\":\"2\"}", true},
		/* ... even where it leads nowhere. */
		{"\"k\":{\"io\":{\"sa\":{\"name\":\"1\"}}},\"k.io\":{\"sb\":{\"name\":\"1\"}}", false},
		{"\"k\":{\"io\":{\"sa\":{\"name\":\"1\"}}},\"k.io\":\"text\"", false},
		{"\"k\":{\"io\":{\"sa\":{\"name\":\"1\"}}},\"k.io.sa\":null", false},
		{"\"k\":{\"io\":{\"sa\":{}}}", false},
		{"\"k\":{\"io\":{\"sa\":{\"names\":\"1\",\"nam\":\"1\"}}}", false},
		{"\"k.io.sa.\":{\"name\":\"1\"},\"k.i\":{\"o\":{\"sa\":{\"name\":\"1\"}}}", false},
		{"\"k\":[{\"io\":{\"sa\":{\"name\":\"1\"}}}]", false},
		{"\"\":{\"k\":{\"io\":{\"sa\":{\"name\":\"1\"}}}}", false},
	};

	check_cloud(cases, sizeof(cases) / sizeof(cases[0]), A_ROLE ",", "");
}


static void test_roles_in_one_text(void)
{
	static const struct cloud_case cases[] = {
		{"\"sensor\"", true}, {"\"a sensor\"", true}, {"\"sensor b\"", true}, {"\"a  sensor b\"", true}, {"\" sensor \"", true},
		{"[\"a\",\"sensor\"]", true}, {"[\"a sensor\"]", false}, {"\"sensors\"", false}, {"\"asensor\"", false},
		{"\"a\\tsensor\"", false}, {"\"a,sensor\"", false}, {"\"Sensor\"", false}, {"\"\"", false}, {"\" \"", false},
		{"{\"sensor\":1}", false}, {"1", false},
	};

	check_cloud(cases, sizeof(cases) / sizeof(cases[0]), AN_ID ",\"r\":{\"a.b\":{\"roles\":", "}}");
}


static bool is_seen(const struct token_keys *cache)
{
	return cache->entries[0].verifier.key == NULL; /* no key was needed to check it */
}


/* Numbers of a signature are written in as few bytes as can be: each length that comes up is taken, and no other number. */
static void test_signatures_of_all_lengths(void)
{
	uint8_t nonces[2 * TOKEN_NONCE] = {0}, signature[512], other[64];
	size_t first[2] = {0}; /* of r and s: how often there was a 0 in front, and a bit that would be a sign */
	uint32_t i;
	int half;

	for(i = 0; i < 1500; i++){
		memcpy(nonces, &i, sizeof(i));
		CHECK(sign(keys[KEY_EC], nonces, sizeof(nonces), signature) == 64);
		CHECK(token__proven(keys[KEY_EC], nonces, (struct slice){signature, 64}));
		for(half = 0; half < 64; half += 32){
			first[0] += signature[half] == 0;
			first[1] += signature[half] >> 7;
			if(i == 0 || signature[half] == 0){
				memcpy(other, signature, 64);
				memset(other + half, 0, 32); /* no number at all: 0 is no r and no s */
				CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){other, 64}));
				memset(other + half, 0xFF, 32); /* above the order */
				CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){other, 64}));
				memcpy(other, signature, 64);
				other[half + 31] ^= 1;
				CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){other, 64}));
			}
		}
	}
	CHECK(first[0] > 0 && first[1] > 0);
	CHECK(ERR_peek_error() == 0);
	CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){signature, 63}));
	CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){signature, 65}));
	CHECK(!token__proven(keys[KEY_ED], nonces, (struct slice){signature, 64}));
	CHECK(!token__proven(keys[KEY_EC], nonces, (struct slice){signature, 0}));
	CHECK(!token__proven(keys[KEY_RSA], nonces, (struct slice){signature, 64}));
}


/* The RSA key of the usual issuer once more, as "p", for PS256. */
static void write_pss_key(struct writer *writer)
{
	struct bytes key = a_key(keys[KEY_RSA], "p"), name = {.len = 0};

	key.at[1] = ALGORITHM_PS256;
	put_hash(&name, ISS, strlen(ISS), 8);
	put_hash(&name, "p", 1, 8);
	write_begin(writer);
	write_record(writer, "keys", name.at, name.len, key.at, key.len);
	write_commit(writer);
}


/* What a signature that was refused leaves behind in a key that is kept ready: nothing. */
static void test_good_signatures_after_bad_ones(void)
{
	static const struct {
		const char *algorithm, *kid;
		int key;
	} cases[] = {{"ES256", "1", KEY_EC}, {"EdDSA", "2", KEY_ED}, {"RS256", "3", KEY_RSA}, {"PS256", "p", KEY_RSA}};
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	char header[128], payload[512], text[4096], *dot;
	uint8_t signature[512], bad[513];
	size_t i, len, round;

	write_pss_key(&writer);
	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		for(round = 0; round < 3; round++){
			size_t j;

			(void)snprintf(header, sizeof(header), "{\"alg\":\"%s\",\"kid\":\"%s\"}", cases[i].algorithm, cases[i].kid);
			(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS "\",\"aud\":\"mqtts://own\",\"iat\":100000,"
					"\"exp\":100009,\"sub\":\"tok-1\",\"jti\":\"%zu-%zu\"" SCOPE "}", i, round);
			strcpy(text, a_token_of(header, payload, keys[cases[i].key]));
			dot = strrchr(text, '.') + 1;
			CHECK(token__decode(dot, strlen(dot), signature, &len));
			memcpy(bad, signature, len);
			bad[len] = 0;
			for(j = 0; j <= len + 1; j += j == 0 ? len - 1 : 2){ /* none at all, a byte less, a byte more */
				*dot = '\0';
				encode(bad, j, text);
				CHECK(reason_of(&store, &cache, text) == REASON_TOKEN_SIGNATURE);
			}
			for(j = 0; j < len; j += 1 + len / 16){
				memcpy(bad, signature, len);
				bad[j] ^= (uint8_t)(1u << (j % 8));
				*dot = '\0';
				encode(bad, len, text);
				CHECK(reason_of(&store, &cache, text) == REASON_TOKEN_SIGNATURE);
			}
			for(j = 0; j < 2; j++){
				memset(bad, j ? 0xFF : 0, len);
				*dot = '\0';
				encode(bad, len, text);
				CHECK(reason_of(&store, &cache, text) == REASON_TOKEN_SIGNATURE);
			}
			*dot = '\0';
			encode(signature, len, text);
			CHECK(reason_of(&store, &cache, text) == REASON_NONE);
		}
	}
	/* Each stayed ready; one key under two algorithms is two. */
	for(i = 0; i < TOKEN_KEYS; i++){
		CHECK((cache.entries[i].verifier.key != NULL) == (i < sizeof(cases) / sizeof(cases[0])));
	}
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


/* PS256 with a zero in front: its shorter form is the same number, and another token. */
static void test_a_signature_is_as_long_as_its_key(void)
{
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	char payload[512], text[4096], *dot = text;
	uint8_t signature[512] = {1};
	size_t len = 0, i;

	write_pss_key(&writer);
	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < 20000 && signature[0] != 0; i++){
		(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS "\",\"aud\":\"mqtts://own\",\"iat\":100000,"
				"\"exp\":100009,\"sub\":\"tok-1\",\"jti\":\"%zu\"" SCOPE "}", i);
		strcpy(text, a_token_of("{\"alg\":\"PS256\",\"kid\":\"p\"}", payload, keys[KEY_RSA]));
		dot = strrchr(text, '.') + 1;
		CHECK(token__decode(dot, strlen(dot), signature, &len));
	}
	CHECK(signature[0] == 0 && len == 256);
	*dot = '\0';
	encode(signature + 1, len - 1, text);
	CHECK(reason_of(&store, &cache, text) == REASON_TOKEN_SIGNATURE);
	*dot = '\0';
	encode(signature, len, text);
	CHECK(reason_of(&store, &cache, text) == REASON_NONE);
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


/* The store takes no such key; what is in one all the same checks nothing. */
static void test_keys_that_do_not_fit_check_nothing(void)
{
	static const struct {
		const char *kind, *algorithm;
		uint8_t number;
	} cases[] = {
		{"P-384", "ES256", ALGORITHM_ES256}, {"RSA-1024", "RS256", ALGORITHM_RS256}, {"RSA-1024", "PS256", ALGORITHM_PS256},
		{"RSA", "ES256", ALGORITHM_ES256}, {"EC", "EdDSA", ALGORITHM_EDDSA}, {"ED", "RS256", ALGORITHM_RS256},
		{"longer", "ES256", ALGORITHM_ES256}, {"cut", "ES256", ALGORITHM_ES256},
	};
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	char text[512], header[128], payload[512];
	size_t i;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		const char kid[] = {(char)('a' + i), '\0'}, *kind = cases[i].kind;
		EVP_PKEY *key = strcmp(kind, "P-384") == 0 ? EVP_EC_gen("P-384") : strcmp(kind, "RSA-1024") == 0 ? EVP_RSA_gen(1024)
				: keys[strcmp(kind, "RSA") == 0 ? KEY_RSA : strcmp(kind, "ED") == 0 ? KEY_ED : KEY_EC];
		struct bytes record = a_key(key, kid), name = {.len = 0};
		const size_t at = 2 + 1 + 1; /* behind kid: the key's length */

		record.at[1] = cases[i].number;
		if(strcmp(kind, "longer") == 0){
			record.at[at]++;
			put_int(&record, 0, 1);
		}else if(strcmp(kind, "cut") == 0){
			record.at[at]--;
			record.len--;
		}
		put_hash(&name, ISS, strlen(ISS), 8);
		put_hash(&name, kid, 1, 8);
		write_begin(&writer);
		write_record(&writer, "keys", name.at, name.len, record.at, record.len);
		write_commit(&writer);
		(void)snprintf(header, sizeof(header), "{\"alg\":\"%s\",\"kid\":\"%s\"}", cases[i].algorithm, kid);
		(void)snprintf(payload, sizeof(payload), "{\"iss\":\"" ISS "\",\"aud\":\"mqtts://own\",\"iat\":100000,"
				"\"exp\":100009,\"sub\":\"tok-1\"" SCOPE "}");
		CHECK(reason_of(&store, &cache, a_token_of(header, payload, strcmp(kind, "P-384") == 0 ? keys[KEY_EC] : key))
				== REASON_STORE);
		CHECK(cache.entries[0].verifier.key == NULL);
		if(strcmp(kind, "P-384") == 0 || strcmp(kind, "RSA-1024") == 0){
			EVP_PKEY_free(key);
		}
	}
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


static void test_hashes(void)
{
	static const uint8_t of_abc[HASH_LEN] = { /* FIPS 180-4 */
		0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae, 0x22, 0x23, 0xb0, 0x03, 0x61,
		0xa3, 0x96, 0x17, 0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad,
	};
	const struct slice parts[] = {{(const uint8_t *)"a", 1}, {NULL, 0}, {(const uint8_t *)"bc", 2}};
	uint8_t digest[HASH_LEN];
	int i;

	for(i = 0; i < 3; i++){
		CHECK(hash__sha256(parts, 3, digest) && memcmp(digest, of_abc, HASH_LEN) == 0);
		if(i == 1){
			hash__forget(); /* as a plugin that is loaded again */
			hash__forget();
		}
	}
}


/* A token that comes again is not checked for its signature again, and whatever differs from it by a bit is. */
static void test_signatures_that_were_seen(void)
{
	struct writer writer = write_store();
	struct store store;
	struct token_keys cache = {0};
	uint8_t (*seen)[HASH_LEN];
	struct bytes key, name = {.len = 0};
	char text[512], good[4096], other[4096], *dot;
	EVP_PKEY *another;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	strcpy(good, a_token("tok-1", TOKEN_TIME + 10, SCOPE));
	dot = strrchr(good, '.');
	/* One that was refused is refused again. */
	strcpy(other, good);
	other[dot - good + 1] = dot[1] == 'A' ? 'B' : 'A';
	CHECK(reason_of(&store, &cache, other) == REASON_TOKEN_SIGNATURE && reason_of(&store, &cache, other) == REASON_TOKEN_SIGNATURE);
	CHECK(reason_of(&store, &cache, good) == REASON_NONE && !is_seen(&cache));
	/* Keep what was seen, and nothing else. */
	seen = cache.seen;
	cache.seen = NULL;
	token__forget_keys(&cache);
	cache.seen = seen;
	CHECK(reason_of(&store, &cache, good) == REASON_NONE && is_seen(&cache));
	/* The good one's signature under other claims, and another signature under its own. */
	CHECK(reason_of(&store, &cache, other) == REASON_TOKEN_SIGNATURE && !is_seen(&cache));
	strcpy(other, a_token("tok-1", TOKEN_TIME + 11, SCOPE));
	strcpy(strrchr(other, '.'), dot);
	CHECK(reason_of(&store, &cache, other) == REASON_TOKEN_SIGNATURE);
	/* All else is looked at as ever. */
	CHECK(reason_of(&store, &cache, good) == REASON_NONE);
	write_begin(&writer);
	another = EVP_EC_gen("P-256"); /* the key of that name is another one now */
	CHECK(another);
	key = a_key(another, "1");
	key.at[1] = ALGORITHM_ES256;
	EVP_PKEY_free(another);
	put_hash(&name, ISS, strlen(ISS), 8);
	put_hash(&name, "1", 1, 8);
	write_record(&writer, "keys", name.at, name.len, key.at, key.len);
	write_commit(&writer);
	CHECK(reason_of(&store, &cache, good) == REASON_TOKEN_SIGNATURE);
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


static void test_messages_of_enhanced_authentication(void)
{
	static const struct {
		const char *text;
		size_t len;
		const char *token; /* NULL: it is none */
	} cases[] = {
#define MESSAGE(TEXT, TOKEN) {TEXT, sizeof(TEXT) - 1, TOKEN}
		MESSAGE("n,,\1auth=Bearer abc\1\1", "abc"), MESSAGE("y,a=x,\1host=h\1auth=bearer abc\1port=1\1\1", "abc"),
		MESSAGE("", NULL), MESSAGE("n", NULL), MESSAGE("n,,", NULL), MESSAGE("n,,\1", NULL), MESSAGE("n,,\1\1", NULL),
		MESSAGE("p=x,,\1auth=Bearer abc\1\1", NULL), MESSAGE("n,b=x,\1auth=Bearer abc\1\1", NULL),
		MESSAGE("n,,\1auth=Bearer abc\1", NULL), MESSAGE("n,,\1auth=Bearer \1\1", NULL),
		MESSAGE("n,,\1auth=Bearer a\1auth=Bearer b\1\1", NULL), MESSAGE("n,,\1auth=Bearer abc\1\1x", NULL),
	};
	struct slice name, token, rest;
	size_t i;

	for(i = 0; i < sizeof(cases) / sizeof(cases[0]); i++){
		uint8_t *copy = malloc(cases[i].len ? cases[i].len : 1);

		memcpy(copy, cases[i].text, cases[i].len);
		CHECK(auth__bearer((struct slice){copy, cases[i].len}, &name, &token) == (cases[i].token != NULL));
		CHECK(!cases[i].token || (token.len == strlen(cases[i].token) && memcmp(token.at, cases[i].token, token.len) == 0));
		free(copy);
	}
	CHECK(auth__bearer((struct slice){(const uint8_t *)cases[1].text, cases[1].len}, &name, &token) && name.len == 1);
	CHECK(auth__ace((struct slice){(const uint8_t *)"\0\3abcd", 6}, &token, &rest) && token.len == 3 && rest.len == 1);
	CHECK(!auth__ace((struct slice){(const uint8_t *)"\0\3ab", 4}, &token, &rest));
	CHECK(!auth__ace((struct slice){(const uint8_t *)"\0\0ab", 4}, &token, &rest));
	CHECK(!auth__ace((struct slice){(const uint8_t *)"\0", 1}, &token, &rest) && !auth__ace((struct slice){NULL, 0}, &token, &rest));
}


static struct challenge *a_challenge(const char *id, const void *client)
{
	const struct moment from = {.family = 4};
	enum reason reason;
	struct token *token = token__read("YQ.YQ.YQ", 8, &reason);

	CHECK(token);
	strcpy(token->id, id);
	EVP_PKEY_up_ref(keys[KEY_ED]);
	return challenge__new(token, keys[KEY_ED], client, NULL, &from);
}


static void test_challenges(void)
{
	static char clients[2 * CHALLENGES + 10];
	struct challenges challenges = {0};
	struct challenge *challenge, *due;
	uint8_t answer[TOKEN_NONCE + 512] = "8 bytes.", both[2 * TOKEN_NONCE];
	char name[CHALLENGE_USERNAME];
	size_t len, i;

	/* Proven by the key, over both nonces, and by nothing else. */
	challenge = a_challenge("tok-1", &clients[0]);
	memcpy(both, challenge->nonce, TOKEN_NONCE);
	memcpy(both + TOKEN_NONCE, answer, TOKEN_NONCE);
	len = TOKEN_NONCE + sign(keys[KEY_ED], both, sizeof(both), answer + TOKEN_NONCE);
	CHECK(challenge__answered(challenge, (struct slice){answer, len}));
	for(i = 0; i < len; i++){
		CHECK(!challenge__answered(challenge, (struct slice){answer, i}));
		answer[i] ^= 1;
		CHECK(!challenge__answered(challenge, (struct slice){answer, len}));
		answer[i] ^= 1;
	}
	/* Of one device a few, the oldest makes room. */
	CHECK(challenges__add(&challenges, challenge, 100));
	for(i = 1; i <= CHALLENGES_SAME; i++){
		CHECK(!challenges__due(&challenges, 100));
		CHECK(challenges__add(&challenges, a_challenge("tok-1", &clients[i]), 100));
	}
	challenge__username(challenge, name);
	CHECK(!record__id_ok(name, strlen(name)));
	due = challenges__due(&challenges, 100);
	CHECK(due == challenge && due->client == &clients[0]);
	CHECK(challenges__take(&challenges, &clients[0]) == challenge && !challenges__take(&challenges, &clients[0]));
	challenge__free(challenge);
	CHECK(!challenges__due(&challenges, 100 + CHALLENGE_SECONDS - 1) && challenges__due(&challenges, 100 + CHALLENGE_SECONDS));
	/* Of all devices not many, and with those that wait for the tick no more than twice as many. */
	for(i = CHALLENGES_SAME + 1; i < sizeof(clients); i++){
		char id[BEDNET_ID_MAX + 1];

		(void)snprintf(id, sizeof(id), "other-%zu", i);
		challenge = a_challenge(id, &clients[i]);
		if(!challenges__add(&challenges, challenge, 100)){
			challenge__free(challenge);
		}
	}
	CHECK(challenges.count == 2 * CHALLENGES);
	for(i = 0; i < sizeof(clients); i++){
		challenge__free(challenges__take(&challenges, &clients[i]));
	}
	CHECK(challenges.count == 0 && !challenges.first);
}


/* A session with a token; NULL when something failed on the way. */
static struct session *a_session(struct sessions *sessions, struct token_keys *cache, const void *client, const char *text)
{
	const struct moment from = {.family = 4};
	struct session *session;
	struct token *token;

	if(check_token(sessions->store, cache, text, &token) != REASON_NONE){
		return NULL;
	}
	token->generation = sessions->token_generation;
	session = sessions__add(sessions, client, token->id, METHOD_TOKEN, NULL, &from);
	if(session == NULL){
		token__free(token);
		return NULL;
	}
	sessions__authorise(session, token);
	return session;
}


static void test_sessions_with_tokens(void)
{
	struct writer writer = write_store();
	struct store store;
	struct sessions sessions;
	struct change_sink sink = {sink_device, sink_issuers, sink_all, &sessions};
	struct token_keys cache = {0};
	struct session *session, *other;
	struct token *token;
	struct bytes key = {.len = 0};
	enum reason why = REASON_NONE;
	static char clients[3], many[100000];
	char text[512];
	bool more;
	size_t i;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	CHECK(sessions__init(&sessions, &store));

	/* It ends at its second, and what it has left stays its device's. */
	session = a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE));
	CHECK(session && sessions__check(&sessions, session, TOKEN_TIME + 14) == REASON_NONE);
	CHECK(!sessions__left(&sessions, "tok-1", false) && sessions__left(&sessions, "tok-1", true) == session->token);
	CHECK(sessions__next_due(&sessions, TOKEN_TIME + 14, &why, &more) == NULL && !more);
	CHECK(sessions__check(&sessions, session, TOKEN_TIME + 15) == REASON_TOKEN_EXPIRED); /* each message asks so */
	CHECK(sessions__next_due(&sessions, TOKEN_TIME + 15, &why, &more) == session && why == REASON_TOKEN_EXPIRED);
	sessions__leave(&sessions, &clients[0]);
	sessions__leave(&sessions, &clients[0]);
	token = sessions__left(&sessions, "tok-1", false);
	CHECK(token && sessions.count == 0 && sessions.device_count == 1 && sessions.left_size == token->size);
	CHECK(sessions__token(&sessions, token, "tok-1", TOKEN_TIME + 99) == REASON_NONE && token->end == TOKEN_TIME + 15);

	/* Of two sessions the one that took over leaves its token, the other none. */
	session = a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE));
	other = a_session(&sessions, &cache, &clients[1], a_token("tok-1", TOKEN_TIME + 20, SCOPE));
	CHECK(session && other);
	sessions__leave(&sessions, &clients[0]);
	CHECK(sessions__left(&sessions, "tok-1", false) == token);
	token = other->token;
	sessions__leave(&sessions, &clients[1]);
	CHECK(sessions__left(&sessions, "tok-1", false) == token);
	/* One that was never let in leaves what was there; one by other means leaves nothing. */
	CHECK(a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE)));
	sessions__remove(&sessions, &clients[0]);
	CHECK(sessions__left(&sessions, "tok-1", false) == token);
	CHECK(sessions__add(&sessions, &clients[0], "tok-1", METHOD_PASSWORD, NULL, &(struct moment){.family = 4}));
	sessions__leave(&sessions, &clients[0]);
	CHECK(!sessions__left(&sessions, "tok-1", false) && sessions.device_count == 0 && sessions.left_size == 0);

	/* A session may be broken from within. */
	session = a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE));
	CHECK(sessions__check(&sessions, session, TOKEN_TIME) == REASON_NONE);
	sessions__break(&sessions, session, REASON_TOKEN_PROOF);
	CHECK(sessions__check(&sessions, session, TOKEN_TIME) == REASON_TOKEN_PROOF);
	CHECK(sessions__next_due(&sessions, TOKEN_TIME, &why, &more) == session && why == REASON_TOKEN_PROOF);
	sessions__remove(&sessions, &clients[0]);

	/* Changes: a cutoff, a token, an issuer. */
	session = a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE ",\"jti\":\"j\""));
	CHECK(sessions__check(&sessions, session, TOKEN_TIME) == REASON_NONE);
	write_begin(&writer);
	put_int(&key, TOKEN_TIME - 1, 8);
	write_record(&writer, "cutoffs", "tok-1", 5, key.at, key.len);
	write_change(&writer, 7, "tok-1");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink) && sessions.generation == 0);
	CHECK(sessions__next_due(&sessions, TOKEN_TIME, &why, &more) == NULL && session->token->state == REASON_NONE);
	write_begin(&writer);
	key.at[0]++;
	write_record(&writer, "cutoffs", "tok-1", 5, key.at, key.len);
	write_change(&writer, 7, "tok-1");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink));
	CHECK(sessions__next_due(&sessions, TOKEN_TIME, &why, &more) == session && why == REASON_TOKEN_REVOKED);
	write_begin(&writer);
	write_record(&writer, "cutoffs", "tok-1", 5, NULL, 0);
	write_change(&writer, 6, "0123456789abcdeftok-1");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink) && sessions__check(&sessions, session, TOKEN_TIME) == REASON_NONE);
	write_begin(&writer);
	key.len = 0;
	put_hash(&key, ISS "\0j", sizeof(ISS "\0j") - 1, 16);
	write_record(&writer, "tokens", key.at, key.len, "12345678", 8);
	put(&key, "tok-1", 6);
	write_change(&writer, 6, "0123456789abcdeftok-1");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink) && sessions.generation == 0);
	CHECK(sessions__check(&sessions, session, TOKEN_TIME) == REASON_TOKEN_REVOKED);
	write_begin(&writer);
	write_record(&writer, "tokens", key.at, 16, NULL, 0);
	key.len = 0;
	put_hash(&key, ISS, strlen(ISS), 8);
	write_record(&writer, "issuers", key.at, key.len, NULL, 0);
	write_change(&writer, 5, "12345678");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink) && sessions.generation == 0 && sessions.token_generation == 1);
	CHECK(sessions__check(&sessions, session, TOKEN_TIME) == REASON_TOKEN_ISSUER);
	sessions__remove(&sessions, &clients[0]);
	write_begin(&writer);
	write_issuers(&writer);
	write_change(&writer, 5, "12345678");
	write_commit(&writer);
	CHECK(store__refresh(&store, &sink));

	/* What is left has its bound. */
	for(i = 0; i < sizeof(many) && sessions.left_size + 4096 < SESSIONS_LEFT; i++){
		char id[BEDNET_ID_MAX + 1];

		(void)snprintf(id, sizeof(id), "x-%zu", i);
		session = sessions__add(&sessions, &many[i], id, METHOD_TOKEN, NULL, &(struct moment){.family = 4});
		token = token__read("YQ.YQ.YQ", 8, &why);
		CHECK(session && token);
		token->size = 4096;
		sessions__authorise(session, token);
		sessions__leave(&sessions, &many[i]);
	}
	CHECK(sessions__left(&sessions, "x-0", false));
	for(i = 0; i < 3; i++){
		session = a_session(&sessions, &cache, &clients[0], a_token("tok-1", TOKEN_TIME + 10, SCOPE));
		session->token->size = 3000;
		sessions__leave(&sessions, &clients[0]);
		session = sessions__add(&sessions, &clients[1], i % 2 ? "temp-1" : "temp-2", METHOD_TOKEN, NULL, &(struct moment){.family = 4});
		token = token__read("YQ.YQ.YQ", 8, &why);
		token->size = 3000;
		sessions__authorise(session, token);
		sessions__leave(&sessions, &clients[1]);
	}
	CHECK(!sessions__left(&sessions, "x-0", false) && sessions__left(&sessions, "x-9", false));
	CHECK(sessions.left_size <= SESSIONS_LEFT && sessions__left(&sessions, "tok-1", false));
	sessions__free(&sessions);
	token__forget_keys(&cache);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


/* A token's life: let in, checked again, renewed, left behind. Signed before anything may fail. */
static bool live_by_token(struct sessions *sessions, struct token_keys *cache)
{
	static char first[2048], second[2048], foreign[2048], many[1200];
	static char clients[2];
	const struct moment from = {.family = 4};
	struct session *session;
	struct token *token;
	struct challenge *challenge;
	bool all = true;
	const long later = fail_at;
	size_t i;

	if(!*first){
		fail_at = -1;
		strcpy(first, a_token("tok-1", TOKEN_TIME + 10, SCOPE ",\"jti\":\"1\""));
		/* More values than the reader expects of a text so long. */
		strcpy(many, SCOPE ",\"jti\":\"2\",\"a\":[0");
		for(i = 0; i < 500; i++){
			strcat(many, ",0");
		}
		strcat(many, "]");
		strcpy(second, a_token("tok-1", TOKEN_TIME + 20, many));
		strcpy(foreign, a_token_of("{\"alg\":\"EdDSA\",\"kid\":\"2\"}", "{\"iss\":\"" ISS_FOREIGN "\",\"sub\":\"1\","
				"\"aud\":\"mqtts://plant\",\"iat\":100000,\"exp\":100009,\"hall\":\"h\",\"a\":{\"roles\":[\"sensor\"],\"desk\":\"d\"}}",
				keys[KEY_ED]));
		fail_at = later;
	}
	session = a_session(sessions, cache, &clients[0], first);
	if(session){
		session->token->stale = true;
		all = sessions__check(sessions, session, TOKEN_TIME) == REASON_NONE;
		CHECK(!all || token__permits(session->token, ACCESS_PUBLISH, "a", 1));
		if(check_token(sessions->store, cache, second, &token) == REASON_NONE){
			challenge = challenge__new(token, NULL, &clients[0], NULL, &from);
			if(challenge){
				sessions__authorise(session, challenge->token);
				challenge->token = NULL;
				challenge__free(challenge);
				all = sessions__check(sessions, session, TOKEN_TIME + 20) == REASON_NONE && all;
			}else{
				all = false;
			}
		}else{
			all = false;
		}
		sessions__leave(sessions, &clients[0]);
	}
	session = session ? a_session(sessions, cache, &clients[1], foreign) : NULL;
	if(session == NULL){
		return false;
	}
	all = sessions__check(sessions, session, TOKEN_TIME) == REASON_NONE && all;
	CHECK(!all || session__grants(session)->count == 2);
	sessions__remove(sessions, &clients[1]);
	return all;
}


/* What a broker asks in a session's life; true when everything that is granted was granted. Whatever fails on the way, what
 * is not granted is refused. */
static bool live(struct store *store, struct writer *writer)
{
	struct sessions sessions;
	struct change_sink sink = {sink_device, sink_issuers, sink_all, &sessions};
	struct moment from = {.family = 4};
	struct certificate certificate = {.id = "temp-1", .serial = {9}, .serial_len = 1, .not_after = 1500};
	struct device device = {.id = "temp-1"};
	struct session *session;
	struct decision decision;
	static char clients[300];
	struct token_keys cache = {0};
	bool all, more = true;
	enum reason why = REASON_NONE;
	size_t i;

	CHECK(sessions__init(&sessions, store));
	all = live_by_token(&sessions, &cache);
	for(i = 0; i < sizeof(clients); i++){
		session = sessions__add(&sessions, &clients[i], i % 2 ? "temp-1" : "temp-2", METHOD_CERTIFICATE, &certificate, &from);
		all = all && session;
		if(!session){
			continue;
		}
		if(sessions__check(&sessions, session, 1) != REASON_NONE){
			all = false;
			continue;
		}
		decision = decide__by(session->device->grants, ACCESS_PUBLISH, "sensors/temp-1/t", 16, &from, store__zone, store);
		CHECK((decision.reason == REASON_NONE) == (i % 2 == 1));
		decision = decide__by(session->device->grants, ACCESS_SUBSCRIBE, "halls/+/1", 9, &from, store__zone, store);
		CHECK(decision.reason == REASON_PARTLY);
	}
	if(device__read(store, &device)){
		CHECK(device.state == REASON_NONE && device.grants);
	}else{
		CHECK(device.state == REASON_INTERNAL && !device.grants);
		all = false;
	}
	device__clear(&device);
	write_begin(writer);
	write_change(writer, 1, "temp-1");
	write_commit(writer);
	CHECK(store__refresh(store, &sink));
	while(more){
		session = sessions__next_due(&sessions, 1501, &why, &more);
		CHECK(!session || why == REASON_CERTIFICATE_TIME);
	}
	for(i = 0; i < sizeof(clients); i++){
		sessions__remove(&sessions, &clients[i]);
	}
	CHECK(sessions.count == 0 && sessions.device_count == (sessions__left(&sessions, "tok-1", false) != NULL));
	sessions__free(&sessions);
	token__forget_keys(&cache);
	return all;
}


static void test_every_allocation_may_fail(void)
{
	struct writer writer = write_store();
	struct store store;
	char text[512];
	bool all = false;
	long at;

	CHECK(store__open(&store, folder, text, sizeof(text)));
	for(at = 0; !all; at++){
		allocations = 0;
		fail_at = at;
		all = live(&store, &writer);
		fail_at = -1;
		CHECK(at < 100000);
		if(allocations <= at){
			break; /* none was left to fail */
		}
		all = false;
	}
	CHECK(at > 300);
	store__close(&store);
	mdb_env_close(writer.env);
	remove_store();
}


static void test_stores_that_are_none(void)
{
	struct writer writer = write_store();
	struct store store;
	char text[512], path[64];

	mdb_env_close(writer.env);
	CHECK(!store__open(&store, "/nowhere", text, sizeof(text)) && strstr(text, "there is no store"));
	(void)snprintf(path, sizeof(path), "%s/data.mdb", folder);
	CHECK(truncate(path, 8192) == 0);
	CHECK(!store__open(&store, folder, text, sizeof(text)) && strstr(text, "shorter"));
	CHECK(truncate(path, 0) == 0);
	CHECK(!store__open(&store, folder, text, sizeof(text)));
	remove_store();
}


int main(void)
{
	make_keys();
	test_filters();
	test_shared_subscriptions();
	test_cut_records_do_not_parse();
	test_values_stay_within_their_level();
	test_a_placeholder_without_a_value_is_unsound();
	test_windows_to_the_second();
	test_a_zone_that_cannot_be_read_denies();
	test_zones();
	test_addresses();
	test_what_is_not_known_counts_against();
	test_passwords();
	test_throttle();
	test_keys_of_nobody();
	test_audit();
	test_lines_of_the_audit_are_shared();
	test_certificate_names();
	test_sessions();
	test_base64url();
	test_cut_records_of_issuers_do_not_parse();
	test_tokens();
	test_a_token_that_there_is_no_memory_for();
	test_json_of_tokens();
	test_times_that_are_none();
	test_dotted_paths();
	test_roles_in_one_text();
	test_hashes();
	test_signatures_of_all_lengths();
	test_good_signatures_after_bad_ones();
	test_a_signature_is_as_long_as_its_key();
	test_keys_that_do_not_fit_check_nothing();
	test_signatures_that_were_seen();
	test_messages_of_enhanced_authentication();
	test_challenges();
	test_sessions_with_tokens();
	test_every_allocation_may_fail();
	test_stores_that_are_none();
	free_keys();
	hash__forget();
	puts("All unit tests passed.");
	return 0;
}
