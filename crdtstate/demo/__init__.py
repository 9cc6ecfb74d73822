"""
The demo: a fleet of real processes on real work, with real faults, and a verdict.

    survey   the work: what is in a tree of Python source, alone and together
    agent    one agent's process
    fleet    all the processes, and what they say
    proxy    a network that can be cut
    story    what happens, and whether it ended well
    screen   what a person sees of it
    command  the command itself

It is the library's main job in one command: documents shared by many processes over a relay, that
survive partitions and kills, and lose and double nothing.
"""
