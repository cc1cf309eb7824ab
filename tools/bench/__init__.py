"""What the measuring tools share: requests and images that no cache has seen, a streaming client that keeps times, a
server of one's own, HF generate as the yardstick, and the numbers' summary.

    workload (seed -> body) -> client (body -> Answer with times) -> summary (answers -> row of numbers)
"""
