"""What Redis 7.0 has and is not here: users' rules may name it (acl.py), as files of Redis' users do."""

_NAMES = """
asking blmove blmpop blpop brpop brpoplpush bzmpop bzpopmax bzpopmin client|caching client|getredir client|tracking
client|trackinginfo client|unblock cluster cluster|addslots cluster|addslotsrange cluster|bumpepoch cluster|count-failure-reports
cluster|countkeysinslot cluster|delslots cluster|delslotsrange cluster|failover cluster|flushslots cluster|forget
cluster|getkeysinslot cluster|help cluster|info cluster|keyslot cluster|links cluster|meet cluster|myid cluster|nodes
cluster|replicas cluster|replicate cluster|reset cluster|saveconfig cluster|set-config-epoch cluster|setslot cluster|shards
cluster|slaves cluster|slots failover fcall fcall_ro function|delete function|dump function|kill function|list function|load
function|restore function|stats geoadd geodist geohash geopos georadius georadius_ro georadiusbymember georadiusbymember_ro
geosearch geosearchstore hdel hexists hget hgetall hincrby hincrbyfloat hkeys hlen hmget hmset hrandfield hscan hset hsetnx hstrlen
hvals latency|graph latency|histogram lindex linsert llen lmove lmpop lolwut lpop lpos lpush lpushx lrange lrem lset ltrim
memory|malloc-stats memory|stats migrate module module|help module|list module|load module|loadex module|unload move pfadd pfcount
pfdebug pfmerge pfselftest psync readonly readwrite replconf replicaof restore-asking rpop rpoplpush rpush rpushx sadd scard
script|debug sdiff sdiffstore sinter sintercard sinterstore sismember slaveof smembers smismember smove sort sort_ro spop spublish
srandmember srem sscan ssubscribe sunion sunionstore sunsubscribe swapdb sync xack xadd xautoclaim xclaim xdel xgroup xgroup|create
xgroup|createconsumer xgroup|delconsumer xgroup|destroy xgroup|help xgroup|setid xinfo xinfo|consumers xinfo|groups xinfo|help
xinfo|stream xlen xpending xrange xread xreadgroup xrevrange xsetid xtrim zadd zcard zcount zdiff zdiffstore zincrby zinter
zintercard zinterstore zlexcount zmpop zmscore zpopmax zpopmin zrandmember zrange zrangebylex zrangebyscore zrangestore zrank zrem
zremrangebylex zremrangebyrank zremrangebyscore zrevrange zrevrangebylex zrevrangebyscore zrevrank zscan zscore zunion zunionstore
"""
ELSEWHERE = frozenset(_NAMES.split())
