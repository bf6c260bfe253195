"""Several chunks under way at a time, within bounded memory."""

from collections import deque

from postlocal.wire.chunks import CHUNK, Chunk
from postlocal.wire.exchange import ChunkWire, Exchange

_STAGED = 12 * CHUNK  # bytes in memory of ours: 48 MiB, and some more for what is small
_HOMEBOUND = 16 * CHUNK  # bytes on their way back, which may need no memory


class Convoy:
    """Exchanges under way, which go on in one order on all ranks.

    What it decides follows from the chunks alone, so that all ranks decide the same.

    Args:
        wire: tells how much memory a chunk takes.
        size: number of ranks.
    """

    def __init__(self, wire: ChunkWire, size: int) -> None:
        self._wire = wire
        self._size = size
        self._outbound: deque[tuple[Chunk, Exchange]] = deque()
        self._homebound: deque[tuple[Chunk, Exchange]] = deque()

    def add(self, chunk: Chunk, exchange: Exchange) -> None:
        """Take along an exchange that was launched."""
        self._outbound.append((chunk, exchange))

    def make_room(self, chunk: Chunk) -> None:
        """Let exchanges go on until there is memory for one more."""
        while self._homebound and self._bytes_back() > _HOMEBOUND:
            self._land()
        while self._staged() + self._outbound_cost(chunk) > _STAGED:
            costs = self._homebound and self._homebound_cost(self._homebound[0][0])
            if self._homebound and (costs or not self._outbound):
                self._land()
            elif self._outbound:
                self._turn()
            else:
                return

    def announce(self) -> None:
        """Let all exchanges end."""
        while self._outbound:
            self._turn()
        while self._homebound:
            self._land()

    def _staged(self) -> int:
        out = sum(self._outbound_cost(chunk) for chunk, _ in self._outbound)
        return out + sum(self._homebound_cost(chunk) for chunk, _ in self._homebound)

    def _outbound_cost(self, chunk: Chunk) -> int:
        return self._wire.staged(chunk, self._size).outbound

    def _homebound_cost(self, chunk: Chunk) -> int:
        return self._wire.staged(chunk, self._size).homebound

    def _bytes_back(self) -> int:
        return sum(chunk.numel * chunk.dtype.itemsize for chunk, _ in self._homebound)

    def _turn(self) -> None:
        chunk, exchange = self._outbound.popleft()
        exchange.turn()
        self._homebound.append((chunk, exchange))

    def _land(self) -> None:
        chunk, exchange = self._homebound.popleft()
        exchange.wait()
        chunk.unpack()
