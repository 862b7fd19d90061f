/* A page of a big value: one frees it (a deleter, or an evictor), two settle pages, one takes page and head chunk for another key, or another
   head chunk, or has the page cut for items.
     freer     bucket.pxd remove_locked, big.pxd big_free_pages      settler   settle.pxd settle_big_page
     writer    table.pxd reserve, collect_pages, put, big.pxd big_seal_locked; clock.pxd give_page
   The pool's lock may be found busy at any time by the freer, which then leaves the page to settlers.
   Property: what goes to the pool, or is left to settlers, is listed by no head that a slot names, and is no page of items. Any of them may
   stop for ever at any step.
   Flaws: NOHASH, the head's hash is not asked for again under the pool's lock; LATEWORD, the freer loads the page's word after it has asked
   whose the page is; TWICE, the settler loads it again when it has seen that it is a big value's. */
#define POOL 0
#define CUT 1
#define ACTIVE 2
#define BIG 4
byte kind = BIG, tok = 0, head = 1, stripe[2], pool;
byte hash[3];               /* of what lives in head chunks 1 and 2 */
byte slot[2];               /* by hash: the head chunk that is named */
bit lists[3];               /* does this head chunk list the page? */
byte chunk = 1;             /* head chunk 1: 1 in use, 0 free. Head chunk 2 is free */
#ifdef NOHASH
#define SAME 1
#else
#define SAME (hash[hd] == h)
#endif
#define NAMED ((slot[0] && lists[slot[0]]) || (slot[1] && lists[slot[1]]))
inline take(l, me) { atomic { l == 0 -> l = me } }
inline push() { atomic { assert(kind == BIG && !NAMED); kind = POOL; tok = 0; head = 0 } }

proctype Freer() {
  byte w, t;
  take(stripe[0], 1); slot[0] = 0; stripe[0] = 0;
#ifdef LATEWORD
  if :: kind == BIG && head == 1 :: else -> goto freed fi;
  atomic { w = kind; t = tok };
#else
  atomic { w = kind; t = tok };
  if :: w == BIG && kind == BIG && head == 1 :: else -> goto freed fi;
#endif
  if
  :: take(pool, 1); if :: kind == w && head == 1 && tok == t -> push() :: else fi; pool = 0
  :: atomic { kind == w && tok == t -> assert(kind == BIG); tok = 0 };       /* busy, and the exchange of the word succeeds */
     if :: atomic { head == 1 -> assert(!NAMED); head = 0 } :: head != 1 fi
  :: kind != w || tok != t                                                   /* busy, and it fails */
  fi;
freed:
  lists[1] = 0; chunk = 0
}
proctype Settler() {
  byte w, t, hd, h; bit listed;
#ifdef TWICE
  if :: kind == BIG :: else -> goto end fi;
  atomic { w = kind; t = tok }; hd = head;
  if :: t == 0 :: else -> goto end fi;
#else
  atomic { w = kind; t = tok }; hd = head;
  if :: w == BIG && t == 0 :: else -> goto end fi;
#endif
  if
  :: hd == 0 -> take(pool, 2); if :: kind == w && tok == t && head == hd -> push() :: else fi; pool = 0
  :: else ->
     h = hash[hd]; take(stripe[h], 2);
     if
     :: hash[hd] == h -> listed = (slot[h] == hd && lists[hd]);
       if
       :: !listed -> take(pool, 2);
         if
         :: atomic { kind == w && tok == t && head == hd && SAME -> push() }
         :: else
         fi; pool = 0
       :: else
       fi
     :: else
     fi;
     stripe[h] = 0
  fi;
end: skip
}
proctype Writer() {
  bit got; byte hd = 2;
  if :: atomic { chunk == 0 -> chunk = 1 }; hd = 1 :: skip :: hd = 0 fi;     /* 0: a page is wanted for items */
  if :: hd -> hash[hd] = 1 :: else fi;
  take(pool, 3);
  if :: kind == POOL -> head = hd; if :: hd -> kind = BIG :: else -> kind = CUT fi; tok = 3; got = 1 :: else fi;
  pool = 0;
  if
  :: got && hd -> lists[hd] = 1; take(stripe[1], 3); slot[1] = hd; tok = 0; stripe[1] = 0
  :: got && !hd -> atomic { kind = ACTIVE; tok = 0 }
  :: else
  fi
}
init { atomic { slot[0] = 1; lists[1] = 1; run Freer(); run Settler(); run Settler(); run Writer() } }
