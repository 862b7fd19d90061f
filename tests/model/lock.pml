/* The lock and the life of rows.
     take      lock.pxd lock_take, lock_try        release   lock.pxd lock_release, shm_ring
     born      token.pxd take_row, row_begin       DEAD      token.pxd dead
   NP processes on a row each; who is killed is followed by another process on the same row.
   Properties: one at a time inside; the dead are never taken for alive; nobody sleeps for ever (no invalid end state).
   Flaws: NOGEN tokens without generation; LIFEFIRST the life byte is locked before the generation is counted; NOKEEP who slept takes the
   word without WAIT; WORDFIRST the word is read before the bell. QUIET: no time-outs (and MAXD 0): then no wake-up may be lost at all. */
#ifndef NP
#define NP 3
#endif
#ifndef MAXD
#define MAXD 1
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
byte word, wgen; bit wwait;             /* row + 1 of the owner or 0, his generation, WAIT */
byte bell, inside, deaths;
bit asleep[NP], life[NP], within[NP], kill[NP];
byte gen[NP], real[NP];                 /* real: generation of the process that lives there, 0: none */
#ifdef NOGEN
#define DEAD(o, g) (!life[o - 1])
#else
#define DEAD(o, g) (gen[o - 1] != g || !life[o - 1])
#endif

inline wake() { /* futex: one of those who sleep */
  atomic { if :: asleep[0] -> asleep[0] = 0 :: asleep[1] -> asleep[1] = 0
#if NP > 2
             :: asleep[2] -> asleep[2] = 0
#endif
             :: else fi } }

proctype P(byte r) {
  byte n, g, b, o, og; bit w, slept, ask, had;
born:
  n = 0;
  {
#ifdef LIFEFIRST
    life[r] = 1; gen[r] = gen[r] + 1;
#else
    gen[r] = gen[r] + 1; life[r] = 1;
#endif
    atomic { g = gen[r]; real[r] = g };
    do
    :: n == ROUNDS -> break
    :: else ->
      slept = 0; ask = 0; had = 0;
      do
      :: had -> break
      :: else ->
#ifdef WORDFIRST
        atomic { o = word; og = wgen; w = wwait }; b = bell;
#else
        b = bell; atomic { o = word; og = wgen; w = wwait };
#endif
        if
        :: o == 0 -> atomic { if :: word == 0 -> word = r + 1; wgen = g; had = 1;
#ifdef NOKEEP
                                                wwait = 0
#else
                                                wwait = slept
#endif
                                :: else fi }
        :: o != 0 && ask ->
          ask = 0;
          if
          :: atomic { DEAD(o, og) -> if :: word == o && wgen == og -> word = r + 1; wgen = g; wwait = 1; had = 1 :: else fi }
          :: atomic { else -> assert(real[o - 1] == og || o != word || og != wgen) }     /* alive: it is, or has let go */
          fi
        :: o != 0 && !ask ->
          if :: w
             :: !w -> atomic { if :: word == o && wgen == og -> wwait = 1; w = 1 :: else fi }
          fi;
          if
          :: w -> atomic { if :: bell == b -> asleep[r] = 1 :: else fi };
                  if :: !asleep[r] -> slept = 1
#ifndef QUIET
                     :: atomic { asleep[r] -> asleep[r] = 0; ask = 1 }
#endif
                  fi
          :: !w
          fi
        fi
      od;
      atomic { inside++; within[r] = 1; assert(inside == 1) };
      atomic { inside--; within[r] = 0 };
      atomic { w = wwait; word = 0; wgen = 0; wwait = 0 };
      if :: w -> bell = bell + 1; wake() :: else fi;
      n++
    od;
    atomic { life[r] = 0; real[r] = 0 }
  } unless { kill[r] };
  if :: atomic { kill[r] -> kill[r] = 0; life[r] = 0; real[r] = 0; asleep[r] = 0; o = 0; og = 0; b = 0;
                 if :: within[r] -> within[r] = 0; inside-- :: else fi }; goto born
     :: else fi
}
proctype Killer() { do :: deaths < MAXD -> if :: kill[0] = 1 :: kill[1] = 1 fi; deaths++ :: break od }
init { atomic { byte i = 0; do :: i < NP -> run P(i); i++ :: else -> break od; run Killer() } }
