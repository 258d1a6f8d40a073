/* SPDX-License-Identifier: Apache-2.0
 *
 * A clock that a test sets: loaded before all else (LD_PRELOAD), it tells the plugin the second that stands first in the file
 * BEDNET_TEST_CLOCK, or the real time where that is 0, as time() and CLOCK_REALTIME. Everything else, and everybody
 * else, is told the real time and the seconds that stand second; those that stand third are added to CLOCK_REALTIME. The
 * broker must not see the first: 2.0.21 counts keep-alives by CLOCK_REALTIME, and a leap of it closes connections. For
 * tests only; nothing of it is in a package.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *told;


__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("BEDNET_TEST_CLOCK");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *at;

	if(file == -1){
		abort();
	}
	at = mmap(NULL, 3 * sizeof(*told), PROT_READ, MAP_SHARED, file, 0);
	close(file);
	if(at == MAP_FAILED){
		abort();
	}
	told = at;
}


static int is_plugin(const void *caller)
{
	Dl_info of;

	return dladdr(caller, &of) != 0 && of.dli_fname && strstr(of.dli_fname, "bednet_plugin") != NULL;
}


static int tell(clockid_t clock, struct timespec *out, const void *caller)
{
	int64_t second = told ? told[0] : 0;

	if(clock == CLOCK_REALTIME && second && is_plugin(caller)){
		out->tv_sec = second;
		out->tv_nsec = 0;
		return 0;
	}
	if(syscall(SYS_clock_gettime, clock, out) != 0){
		return -1;
	}
	if(told){
		out->tv_sec += told[1] + (clock == CLOCK_REALTIME ? told[2] : 0);
	}
	return 0;
}


int clock_gettime(clockid_t clock, struct timespec *out)
{
	return tell(clock, out, __builtin_return_address(0));
}


time_t time(time_t *out)
{
	struct timespec now = {0, 0};

	if(tell(CLOCK_REALTIME, &now, __builtin_return_address(0)) != 0){
		return -1;
	}
	if(out){
		*out = now.tv_sec;
	}
	return now.tv_sec;
}
