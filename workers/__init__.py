"""One job and many: specs, identity, data, the engine that trains, hosts and the fleet that places jobs on them."""
