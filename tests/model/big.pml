/* A page of a big value: one deletes it, one settles pages, one takes page and head chunk for another key.
     deleter   bucket.pxd remove_locked, big.pxd big_free_pages      settler   settle.pxd settle_big_page
     writer    table.pxd reserve, collect_pages, put, big.pxd big_seal_locked
   Property: a page in the pool is listed by no head that a slot names. Any of them may stop for ever at any step.
   Flaw: NOHASH, the head's hash is not asked for again under the pool's lock. */
#define POOL 0
#define BIG 4
byte kind = BIG, tok = 0, head = 1, hash = 0, slot[2], stripe[2], pool, chunk = 1;  /* chunk: 1 in use, 0 free */
bit lists = 1;
#ifdef NOHASH
#define SAME 1
#else
#define SAME (hash == h)
#endif
inline take(l, me) { atomic { l == 0 -> l = me } }
inline push() { atomic { assert(!(lists && slot[hash] == 1)); kind = POOL; tok = 0; head = 0 } }

proctype Deleter() {
  take(stripe[0], 1); slot[0] = 0; stripe[0] = 0;
  take(pool, 1); if :: kind == BIG && head == 1 && tok == 0 -> push() :: else fi; pool = 0;
  lists = 0; chunk = 0
}
proctype Settler() {
  byte w, t, hd, h; bit listed;
  atomic { w = kind; t = tok; hd = head };
  if :: w == BIG && hd == 1 && t == 0 :: else -> goto end fi;
  h = hash; take(stripe[h], 2);
  if
  :: hash == h -> listed = (slot[h] == 1 && lists);
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
  stripe[h] = 0;
end: skip
}
proctype Writer() {
  bit got;
  if :: atomic { chunk == 0 -> chunk = 1 }; hash = 1;
        take(pool, 3); if :: kind == POOL -> head = 1; kind = BIG; tok = 3; got = 1 :: else fi; pool = 0;
        if :: got -> lists = 1; take(stripe[1], 3); slot[1] = 1; tok = 0; stripe[1] = 0 :: else fi
     :: skip
  fi
}
init { atomic { slot[0] = 1; run Deleter(); run Settler(); run Writer() } }
