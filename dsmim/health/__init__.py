"""What happens when a run is interrupted or fails.

interrupt, outcome    requests to stop; how a run can end
monitor               learning that a rank is missing, as one object made of
  status                what a rank says about itself
  heartbeat, board      the thread that shows it to the others; where it is shown
  watchdog              the thread that ends a process without progress
  diagnosis, blame      asking the board who is missing; putting it into a sentence
collectives           timeouts of collectives, and their errors
host, memory_limit    memory and open files of ranks and nodes
replay                batches whose loss was not finite
"""
