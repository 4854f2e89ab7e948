"""Places for conversations: never more than there are, the oldest batch first, none lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from sod_mcore.rollout.slots import Slots


def test_the_smallest_priority_goes_first_and_equals_in_order() -> None:
    async def work() -> list[str]:
        slots, order = Slots(1), []

        async def visit(name: str, priority: int) -> None:
            async with slots.hold(priority):
                order.append(name)
                await asyncio.sleep(0)

        async with slots.hold(0):
            visits = [("late", 2), ("old a", 1), ("old b", 1), ("urgent", -1)]
            tasks = [asyncio.create_task(visit(*each)) for each in visits]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(work()) == ["urgent", "old a", "old b", "late"]


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_lost_or_made_by_cancellation(seed: int) -> None:
    """Visitors that are cancelled at random times, also in the moment in which their turn comes."""
    places, chance = 3, random.Random(seed)

    async def work() -> None:
        slots, inside = Slots(places), 0

        async def visit(priority: int) -> None:
            nonlocal inside
            async with slots.hold(priority):
                inside += 1
                assert inside <= places
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                inside -= 1

        async def waiting_visit(priority: int) -> None:
            async with slots.hold(priority):
                pass

        async def disturb() -> None:
            tasks = [asyncio.create_task(waiting_visit(chance.randrange(3))) for _ in range(50)]
            for task in chance.sample(tasks, 40):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        await asyncio.gather(*(visit(chance.randrange(3)) for _ in range(50)), disturb())
        async with asyncio.timeout(10), slots.hold(0), slots.hold(0), slots.hold(0):
            pass  # all three are there again
        with pytest.raises(TimeoutError):
            async with (
                asyncio.timeout(0.05),
                slots.hold(0),
                slots.hold(0),
                slots.hold(0),
                slots.hold(0),
            ):
                pass

    asyncio.run(work())
