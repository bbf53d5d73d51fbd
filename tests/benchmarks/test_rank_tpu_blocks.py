"""Reading the compiler's static schedules: a small text in their form, counted by hand."""

import pytest
from benchmark_script import load_script

SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s0 = inlined_call_operand.hbm } /* entry bundle: %scan.1 = (f32[8]) custom-call(%a) */
   0x1   :  { %10 = vsyncpa [#allocation5], 0 }
   0x2 LB: > { %s21_s1 = sphi %s2_s1, %s9 /* phi copy :: iteration index, stage = 1 iter bound = 1 */ }
   0x3   : > { %p1_p0 = scmp.ne.s32.totalorder %s21_s1, 0  ;;  %p2_p2 = scmp.ne.s32.totalorder %s5_s5, 1 }
   0x4   : > { %9 = sbr.rel (%p1_p0) target = $region4 /*
iteration_bounds: (3, 4)
*/ }
   0x5   : > { %11 = vst [vmem:[#allocation3] sm:$0xff] %v1 }
   0x6   :  {}
   0x7   : > { %12 = vst [vmem:[#allocation3 + $0x8] sm:$0xff] %v1 }
   0x8 PF: > { %s7 = sshll.u32 %s3, 5 } /* Start/End empty region 4 :: Start region 40 */
   0x9 LB: >> { %s8 = sadd.s32 1, %s9 }
   0xa   : >> { %373 = sbr.rel (!%p3_p3) target = $region17 }
   0xb   : > { %9 = sbr.rel (%p2_p2) target = $region5 }
   0xc   : > { %v3 = vadd.f32 %v1, %v2 }
   0xd PF: > { %p24_p1 = scmp.ge.s32.totalorder %s27, 14 /* loop exit test */ } /* Start region 5 */
   0xe   : > { %26 = sbr.rel (!%p24_p1) target = $region18 }
   0xf   :  { %669 = vsyncpa [#allocation5], 1 } /* exit bundle: %scan.1 = custom-call(%a) */
"""


@pytest.fixture(scope="module")
def rank():
    return load_script("rank_tpu_blocks")


def test_bundles_of_steps_edges_and_inner_loops(rank):
    found = rank.read_schedule(SCHEDULE)
    # 12 steps in sweeps of 4. Outside: 0, 1 and f. The branch on the axis' index leaves out 5, 6 (an empty
    # bundle, written without its depth) and 7; the one on another number counts as taken in every step.
    assert found == rank.Schedule("scan.1", 12, 4, once=3, step=8, edge=3, inner=(2,))
    assert found.cycles((32,)) == 3 + 12 * (8 + 32 * 2) + 3 * 3


def test_turns_of_every_inner_loop_must_be_told(rank):
    with pytest.raises(ValueError, match="shorter"):
        rank.read_schedule(SCHEDULE).cycles()


def test_a_fusion_is_no_kernel(rank):
    assert rank.read_schedule("   0x1   :  { %s0 = smov } /* entry bundle: %fusion.1 = fusion(%a) */") is None


def test_smallest_block_near_the_fewest_cycles(rank):
    cycles = {(128, 512): 11.0, (256, 512): 10.4, (512, 512): 10.0, (1024, 512): None}
    assert rank.smallest(cycles) == (256, 512)
    assert rank.smallest(cycles, tolerance=0.2) == (128, 512)
    assert rank.smallest({(128, 128): None}) is None
