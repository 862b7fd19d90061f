/* A chain with one overflow bucket, its pool, a reader, and deaths in growing and shrinking.
     grow      bucket.pxd chain_grow_locked      shrink    bucket.pxd chain_shrink_locked
     settler   settle.pxd settle_overflow        reader    table.pxd read_begin (versions: the head's alone)
   Key 1 stands in the overflow bucket from the start, or is put there; while it is there all the time a reader may not miss it.
   Properties: no false miss; a bucket is never in the pool and in a chain; none is lost when all is settled.
   Flaws: MOVE entries move to the head with one version bump behind both stores; NOASK the settler does not ask whether it is in the chain. */
#define OVFREE 0
#define OVRES 1
#define OVLINKED 2
byte ver, stripe, deaths, dead;                 /* dead: token of who was killed */
byte hslot = 0, oslot, link, kind = OVFREE, tok; /* one head slot, one overflow bucket */
bit pooled = 1, present, kill, over;
inline take(me) { if :: atomic { stripe == 0 -> stripe = me } :: atomic { stripe != 0 && stripe == dead -> stripe = me } fi }

proctype Writer() {
  { take(1);
    atomic { pooled -> pooled = 0; kind = OVRES; tok = 1 };       /* under the pool's lock */
    oslot = 0; link = 1; kind = OVLINKED; tok = 0;
    oslot = 1; ver = ver + 1; present = 1;
    stripe = 0;
    if
    :: skip
    :: take(1);
#ifdef MOVE
       oslot = 0; hslot = 1; ver = ver + 1;
#else
       present = 0; oslot = 0; ver = ver + 1;                     /* deleted: the bucket is empty, and last */
       kind = OVRES; tok = 1; link = 0; ver = ver + 1;
       atomic { assert(link == 0); kind = OVFREE; tok = 0; pooled = 1 };
#endif
       stripe = 0
    fi
  } unless { kill };
  if :: atomic { kill -> kill = 0; dead = 1 } :: else fi;
  over = 1
}
proctype Reader() {
  byte v, x, n; bit before, found;
  do
  :: n == 2 -> break
  :: else ->
    n++; found = 0;
    atomic { before = present; v = ver };
    if :: hslot == 1 -> found = 1 :: else fi;
    if :: !found && link == 1 -> if :: oslot == 1 -> found = 1 :: else fi :: else fi;
    atomic { if :: ver == v && !found -> assert(!(before && present)) :: else fi }
  od
}
proctype Settler() {
  byte t;
  over;
  t = tok;
  if
  :: kind == OVRES && t != 0 && t == dead -> take(2);
     if
     :: kind == OVRES && tok == t ->
        if
#ifndef NOASK
        :: link == 1 -> atomic { kind = OVLINKED; tok = 0 }
        :: link == 0 -> ver = ver + 1; atomic { kind = OVFREE; tok = 0; pooled = 1 }
#else
        :: ver = ver + 1; atomic { kind = OVFREE; tok = 0; pooled = 1 }
#endif
        fi
     :: else
     fi; stripe = 0
  :: else
  fi;
  atomic { assert(!(pooled && link == 1)); assert(pooled || link == 1) }
}
proctype Killer() { if :: kill = 1 :: skip fi }
init { atomic { run Writer(); run Reader(); run Settler(); run Killer() } }
