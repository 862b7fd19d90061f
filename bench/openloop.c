/* Requests by a fixed schedule, whatever the server does; latency counts from the scheduled instant, so a stall is paid by all it delays.

       openloop WHERE RATE SECONDS WARMUP CONNECTIONS KEYS VALUE_BYTES GETS_PERCENT SEED

   WHERE is a port of 127.0.0.1, or the path of a unix socket. Request i is due at start + i / RATE, and goes to connection i % CONNECTIONS:
   a GET or SET of a key drawn uniformly. Each connection has a ring of what is due, sent and answered, in that order; the answers of RESP2
   come in order. What is due in WARMUP is done and not counted. Prints one JSON object; "late" is how long after its instant a request was
   taken up: the generator's own delay, which is part of the latency. "overloaded": a ring was full, and it gave up. */

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { RING = 1 << 15, OUT = 1 << 15, LINE = 128, VALUE_MOST = 8192, SUB = 128, DRAIN_S = 5 };

struct request {
    uint64_t due;
    uint32_t key;
    uint32_t set;
};

struct connection {
    int fd, blocked;
    uint64_t due, sent, answered; /* counts: answered <= sent <= due <= answered + RING */
    struct request ring[RING];
    char out[OUT];
    size_t from, to; /* of out */
    char line[LINE];
    size_t line_len;
    uint64_t skip; /* of a bulk string and its CRLF */
};

static uint64_t latency[64 * SUB], late[64 * SUB], counted_from;
static uint64_t counted, hits, misses, errors, answered, random_state;
static char first_error[LINE], value[VALUE_MOST];
static int value_bytes;

static void die(const char *what) {
    fprintf(stderr, "openloop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t draw(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

/* A histogram's cell: exact below 2 * SUB ns, then SUB cells for each doubling, so within 0.8 %. */
static int cell(uint64_t v) {
    int shift = v < 2 * SUB ? 0 : 63 - __builtin_clzll(v) - __builtin_ctz(SUB);
    return shift * SUB + (int)(v >> shift);
}

static uint64_t most_of(int c) {
    int shift = c < 2 * SUB ? 0 : c / SUB - 1;
    return (((uint64_t)(c - shift * SUB) + 1) << shift) - 1;
}

static double quantile_us(const uint64_t *cells, uint64_t n, double q) {
    uint64_t seen = 0, wanted = (uint64_t)(q * (double)n);
    if (n == 0)
        return 0;
    if (wanted >= n)
        wanted = n - 1;
    for (int c = 0; c < 64 * SUB; c++)
        if ((seen += cells[c]) > wanted)
            return (double)most_of(c) / 1000;
    return 0;
}

static int dial(const char *where) {
    int fd, one = 1;
    if (where[0] == '/') {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        if (strlen(where) >= sizeof a.sun_path)
            errno = ENAMETOOLONG, die(where);
        strcpy(a.sun_path, where);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a))
            die("connect");
    } else {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(where)), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a))
            die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    return fd;
}

static void write_some(struct connection *c) {
    while (!c->blocked) {
        if (c->from == c->to)
            c->from = c->to = 0;
        while (c->sent < c->due && OUT - c->to >= (size_t)value_bytes + 100) {
            struct request *r = &c->ring[c->sent++ % RING];
            char *at = c->out + c->to;
            int n = sprintf(at, "*%d\r\n$3\r\n%s\r\n$22\r\nkey:%018u\r\n", r->set ? 3 : 2, r->set ? "SET" : "GET", r->key);
            if (r->set) {
                n += sprintf(at + n, "$%d\r\n", value_bytes);
                memcpy(at + n, value, (size_t)value_bytes);
                memcpy(at + n + value_bytes, "\r\n", 2);
                n += value_bytes + 2;
            }
            c->to += (size_t)n;
        }
        if (c->from == c->to)
            return;
        ssize_t n = send(c->fd, c->out + c->from, c->to - c->from, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            c->blocked = 1; /* till epoll says that it takes more */
        else if (n < 0)
            die("send");
        else
            c->from += (size_t)n;
    }
}

static void one_answer(struct connection *c, uint64_t at) {
    if (c->answered == c->sent)
        errno = EPROTO, die("an answer that nobody asked for");
    struct request *r = &c->ring[c->answered++ % RING];
    answered++;
    if (r->due >= counted_from) {
        latency[cell(at - r->due)]++;
        counted++;
    }
}

static void one_line(struct connection *c, uint64_t at) {
    char kind = c->line[0];
    if (kind == '$' && c->line[1] != '-') {
        hits++;
        c->skip = strtoull(c->line + 1, NULL, 10) + 2;
        return;
    }
    if (kind == '$' || kind == '_')
        misses++;
    else if (kind == '-') {
        if (errors++ == 0)
            memcpy(first_error, c->line, LINE);
    } else if (kind != '+')
        errno = EPROTO, die(c->line);
    one_answer(c, at);
}

/* Reads once; whether there may be more. */
static int read_some(struct connection *c) {
    static char in[1 << 16];
    ssize_t n = recv(c->fd, in, sizeof in, MSG_DONTWAIT);
    if (n == 0)
        errno = ECONNRESET;
    if (n == 0 || (n < 0 && errno != EAGAIN))
        die("recv");
    uint64_t at = now_ns();
    for (ssize_t i = 0; i < n;) {
        if (c->skip) {
            uint64_t step = (uint64_t)(n - i) < c->skip ? (uint64_t)(n - i) : c->skip;
            i += (ssize_t)step;
            if ((c->skip -= step) == 0)
                one_answer(c, at);
        } else if (in[i++] == '\n') {
            c->line[c->line_len] = 0;
            c->line_len = 0;
            one_line(c, at);
        } else if (in[i - 1] != '\r' && c->line_len < LINE - 1)
            c->line[c->line_len++] = in[i - 1];
    }
    return n == sizeof in;
}

int main(int argc, char **argv) {
    if (argc != 10)
        return fprintf(stderr, "usage: openloop WHERE RATE SECONDS WARMUP CONNECTIONS KEYS VALUE_BYTES GETS_PERCENT SEED\n"), 2;
    double rate = atof(argv[2]), seconds = atof(argv[3]), warmup = atof(argv[4]);
    int connections = atoi(argv[5]), gets = atoi(argv[8]), overloaded = 0;
    uint64_t keys = strtoull(argv[6], NULL, 10), total = (uint64_t)(rate * (seconds + warmup)), i = 0;
    value_bytes = atoi(argv[7]);
    random_state = strtoull(argv[9], NULL, 10) * 2654435769u + 88172645463325252u;
    if (rate <= 0 || connections < 1 || keys < 1 || value_bytes < 0 || value_bytes > VALUE_MOST)
        return fprintf(stderr, "openloop: an argument is out of range\n"), 2;
    memset(value, 'v', sizeof value);
    prctl(PR_SET_TIMERSLACK, 1);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    int poll = epoll_create1(EPOLL_CLOEXEC);
    if (all == NULL || poll < 0)
        die("start");
    for (int k = 0; k < connections; k++) {
        struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = &all[k]};
        all[k].fd = dial(argv[1]);
        if (epoll_ctl(poll, EPOLL_CTL_ADD, all[k].fd, &e))
            die("epoll_ctl");
        memset(all[k].ring, 1, sizeof all[k].ring); /* its pages are there before the first instant */
    }
    uint64_t start = now_ns() + 10000000, last = 0, give_up = 0;
    counted_from = start + (uint64_t)(warmup * 1e9);
    for (;;) {
        uint64_t at = now_ns(), due = start + (uint64_t)((double)i * 1e9 / rate), first = i;
        while (i < total && due <= at && !overloaded) {
            struct connection *c = &all[i % (uint64_t)connections];
            if (c->due - c->answered == RING) {
                overloaded = 1;
                break;
            }
            c->ring[c->due++ % RING] = (struct request){due, (uint32_t)(draw() % keys), draw() % 100 >= (uint64_t)gets};
            if (due >= counted_from)
                late[cell(at - due)]++;
            due = start + (uint64_t)((double)++i * 1e9 / rate);
            if (i - first == 256)
                break; /* answers are looked at between two heaps */
        }
        for (uint64_t k = first; k < i && k < first + (uint64_t)connections; k++)
            write_some(&all[k % (uint64_t)connections]);
        if (i == total || overloaded) {
            if (give_up == 0)
                give_up = at + (uint64_t)DRAIN_S * 1000000000u;
            if (answered == i || at > give_up || overloaded)
                break;
            due = at + 10000000;
        }
        struct epoll_event got[256];
        at = now_ns();
        struct timespec wait = {0, due > at ? (long)(due - at < 100000000 ? due - at : 100000000) : 0};
        int n = epoll_pwait2(poll, got, 256, &wait, NULL);
        if (n < 0 && errno != EINTR)
            die("epoll");
        for (int k = 0; k < n; k++) {
            struct connection *c = got[k].data.ptr;
            while (read_some(c)) { /* the edge comes once */
            }
            if (got[k].events & EPOLLOUT && c->blocked) {
                c->blocked = 0;
                write_some(c);
            }
            last = now_ns();
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    uint64_t taken = 0, most = 0;
    for (int c = 0; c < 64 * SUB; c++) {
        taken += late[c];
        if (latency[c])
            most = most_of(c);
    }
    for (char *p = first_error; *p; p++)
        if (*p == '"' || *p == '\\' || (unsigned char)*p < ' ')
            *p = '?';
    printf("{\"asked\": %.0f, \"seconds\": %.2f, \"requests\": %llu, \"unanswered\": %llu, \"overloaded\": %s, \"answered_per_s\": %.0f, ", rate,
           seconds, (unsigned long long)i, (unsigned long long)(i - answered), overloaded ? "true" : "false",
           last > start ? (double)answered * 1e9 / (double)(last - start) : 0.0);
    printf("\"hits\": %llu, \"misses\": %llu, \"errors\": %llu, \"first_error\": \"%s\", ", (unsigned long long)hits, (unsigned long long)misses,
           (unsigned long long)errors, first_error);
    printf("\"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f, ", quantile_us(latency, counted, 0.5),
           quantile_us(latency, counted, 0.99), quantile_us(latency, counted, 0.999), (double)most / 1000);
    printf("\"late_p99_us\": %.1f, \"late_p999_us\": %.1f, \"generator_cpu_s\": %.2f}\n", quantile_us(late, taken, 0.99),
           quantile_us(late, taken, 0.999), cpu);
    return 0;
}
