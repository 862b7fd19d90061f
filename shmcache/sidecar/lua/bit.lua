-- Operations on 32-bit numbers, as the library `bit` has them.

local number_of = ...
local floor, format, select, sub = math.floor, string.format, select, string.sub

local ROUND = 6755399441055744      -- 2^52 + 2^51: what is added to it has no fraction any more

local function unsigned(n)
    return (n + ROUND - ROUND) % 4294967296
end

local function signed(n)
    return n >= 2147483648 and n - 4294967296 or n
end

local tables = {}                   -- of two numbers of 4 bits, as 16 * a + b
local function table_of(name, of_bits)
    local found = {}
    for a = 0, 15 do
        for b = 0, 15 do
            local n = 0
            for i = 3, 0, -1 do n = 2 * n + of_bits(floor(a / 2 ^ i) % 2, floor(b / 2 ^ i) % 2) end
            found[16 * a + b] = n
        end
    end
    tables[name] = found
end
table_of("band", function(a, b) return a * b end)
table_of("bor", function(a, b) return a + b > 0 and 1 or 0 end)
table_of("bxor", function(a, b) return (a + b) % 2 end)

local function both(t, a, b)
    local n, weight = 0, 1
    while weight < 4294967296 do
        local x, y = a % 16, b % 16
        n = n + t[16 * x + y] * weight
        a, b, weight = (a - x) / 16, (b - y) / 16, weight * 16
    end
    return n
end

local bit = {}

for name, t in next, tables do
    bit[name] = function(...)
        local n = unsigned(number_of((...), 1, name))
        for i = 2, select("#", ...) do n = both(t, n, unsigned(number_of(select(i, ...), i, name))) end
        return signed(n)
    end
end

function bit.tobit(n)
    return signed(unsigned(number_of(n, 1, "tobit")))
end

function bit.bnot(n)
    return signed(4294967295 - unsigned(number_of(n, 1, "bnot")))
end

local function left(n, by)
    return n * 2 ^ by % 4294967296
end

local function right(n, by)
    return floor(n / 2 ^ by)
end

local function shift(name, of)
    bit[name] = function(n, by)
        return signed(of(unsigned(number_of(n, 1, name)), unsigned(number_of(by, 2, name)) % 32))
    end
end
shift("lshift", left)
shift("rshift", right)
shift("arshift", function(n, by) return n < 2147483648 and right(n, by) or right(n, by) + 4294967296 - 2 ^ (32 - by) end)
shift("rol", function(n, by) return (left(n, by) + right(n, 32 - by)) % 4294967296 end)
shift("ror", function(n, by) return (right(n, by) + left(n, 32 - by)) % 4294967296 end)

function bit.bswap(n)
    n = unsigned(number_of(n, 1, "bswap"))
    local found = 0
    for _ = 1, 4 do
        found = found * 256 + n % 256
        n = floor(n / 256)
    end
    return signed(found)
end

function bit.tohex(n, digits)
    n = unsigned(number_of(n, 1, "tohex"))
    digits = digits == nil and 8 or signed(unsigned(number_of(digits, 2, "tohex")))
    local text = format(digits < 0 and "%08X" or "%08x", n)
    if digits < 0 then digits = -digits end
    return digits >= 8 and text or sub(text, 9 - digits)
end

return bit
