/* A page that is drained and cut anew while a hand has one of its items chosen.
     evictor   clock.pxd evict_one, evict_chunk      drainer   clock.pxd drain_page, slab.pxd cut_page      writer   table.pxd put
   One address; before: an item of hash 0 in class 1. After the cut: class 2, an item of hash 1.
   Properties: what is evicted for a class is a chunk of it; no chunk is FREE and named by a slot.
   Flaw: NORECHECK, the class is not asked for again under the stripe. */
#define FREE 0
#define RES 1
#define LIVE 2
#define RET 3
byte kind = LIVE, hash = 0, cls = 1, slot[2], stripe[2], clock, list;
#ifdef NORECHECK
#define STILL 1
#else
#define STILL (cls == 1)
#endif
inline take(l, me) { atomic { l == 0 -> l = me } }
inline freed() { atomic { assert(slot[0] == 0 && slot[1] == 0); kind = FREE; list = 1 } }

proctype Evictor() {
  byte h; bit mine;
  if :: kind == LIVE && cls == 1 :: else -> goto end fi;          /* the hand's look, without a lock */
  h = hash;
  take(stripe[h], 1);
  if
  :: atomic { slot[h] == 1 && hash == h && kind == LIVE && STILL -> kind = RET }; slot[h] = 0; mine = 1
  :: else
  fi;
  stripe[h] = 0;
  if :: mine -> atomic { assert(cls == 1); kind = RES }; freed() :: else fi;   /* inherited, used, freed in the end */
end: skip
}
proctype Drainer() {
  byte h; bit out;
  do                                                               /* empty the chunk */
  :: kind == FREE -> out = 1; break
  :: kind == LIVE -> h = hash; take(stripe[h], 2);
     if :: atomic { slot[h] == 1 && hash == h && kind == LIVE -> kind = RET }; slot[h] = 0; stripe[h] = 0; freed() :: else -> stripe[h] = 0 fi
  :: kind == RES || kind == RET -> break                           /* somebody alive is using it: the page stays */
  od;
  if :: atomic { out && kind == FREE && list == 1 -> list = 0; cls = 2 } :: else fi;
  if :: cls == 2 -> list = 1 :: else fi
}
proctype Writer() {
  bit got;
  do
  :: atomic { cls == 2 && list == 1 && kind == FREE -> list = 0; kind = RES }; hash = 1;
     take(stripe[1], 3); slot[1] = 1; kind = LIVE; stripe[1] = 0; break
  :: break
  od
}
init { atomic { slot[0] = 1; run Evictor(); run Drainer(); run Writer() } }
