/* A chunk in hand, its owner, a drainer of its page, a settler; any of the first two may be killed at any step.
     owner     slab.pxd keep, take_kept, batch_get, chunk_push_locked      drainer   clock.pxd empty_chunk, drain_page
     settler   settle.pxd settle_chunk
   Property: when all is quiet the chunk is FREE, or KEPT by the living owner whose slot names it. Nobody has it twice.
   Flaw: TWOSTEP, the chunk in hand is RESERVED, and a drainer empties the slot, then claims the word. */
#define FREE 0
#define RES 1
#define KEPT 4
byte kind = FREE, tok, slot, users, deaths;
bit alive[3], kill[3], done[3];
#ifdef TWOSTEP
#define HAND RES
#else
#define HAND KEPT
#endif

proctype Owner() {
  byte x, n; bit got;
  { alive[1] = 1;
    atomic { kind = RES; tok = 1; users++ };                      /* popped */
    do
    :: n == 3 -> break
    :: else ->
      atomic { users--; assert(users == 0); kind = HAND };        /* keep: the word */
      if :: slot == 0 -> slot = 1 :: else fi;                     /* and the note of it */
      n++;
      if :: break :: skip fi;
      x = slot; slot = 0;                                         /* exchange, by the only thread */
      if
      :: x == 1 ->
#ifdef TWOSTEP
        atomic { got = 1; kind = RES; users++; assert(users == 1) }
#else
        atomic { if :: kind == KEPT && tok == 1 -> kind = RES; got = 1; users++; assert(users == 1) :: else -> got = 0 fi }
#endif
      :: else -> got = 0
      fi;
      if
      :: !got -> break
      :: got
      fi
    od;
    done[1] = 1
  } unless { kill[1] };
  if :: atomic { kill[1] -> kill[1] = 0; alive[1] = 0; done[1] = 1; if :: kind == RES && tok == 1 && users > 0 -> users-- :: else fi } :: else fi
}
proctype Drainer() {
  byte t; bit got;
  { alive[2] = 1;
    t = tok;
    if
#ifdef TWOSTEP
    :: atomic { slot == 1 -> slot = 0 };
       atomic { if :: kind == RES && tok == t -> tok = 2; got = 1; users++; assert(users == 1) :: else -> got = 0 fi }
#else
    :: atomic { kind == KEPT && tok == t -> kind = RES; tok = 2; got = 1; users++; assert(users == 1) }
#endif
    :: done[1] -> got = 0
    fi;
    if :: got -> atomic { kind = FREE; tok = 0; users-- } :: else fi;
    done[2] = 1
  } unless { kill[2] };
  if :: atomic { kill[2] -> kill[2] = 0; alive[2] = 0; done[2] = 1; if :: kind == RES && tok == 2 && users > 0 -> users-- :: else fi } :: else fi
}
proctype Settler() {
  atomic { done[1] && done[2] ->
    if :: kind != FREE && tok != 0 && !alive[tok] -> kind = FREE; tok = 0 :: else fi;
    assert(kind == FREE || (kind == HAND && tok == 1 && alive[1] && slot == 1) || (kind == RES && tok == 1 && alive[1] && users == 1)) }
}
proctype Killer() { do :: deaths < 1 -> if :: kill[1] = 1 :: kill[2] = 1 fi; deaths++ :: break od }
init { atomic { run Owner(); run Drainer(); run Settler(); run Killer() } }
