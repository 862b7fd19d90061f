-- Replies as Lua values, and Lua values as replies, as Redis documents it. `script`: the protocol that the script asked for (redis.setresp),
-- `client`: the one of who is answered.

local replaced = ...
local byte, concat, find, format, len, next, rawget, sub, tonumber, type =
    string.byte, table.concat, string.find, string.format, string.len, next, rawget, string.sub, tonumber, type

local MOST_NESTED = 86      -- as deep as Redis gets

local resp = {script = 2, client = 2}
local parse

local function several(data, at, n)
    local found, value = {}, nil
    for i = 1, n do
        value, at = parse(data, at)
        found[i] = value
    end
    return found, at
end

local function pairs_of(data, at, n, value_of)
    local found, key, value = {}, nil, nil
    for _ = 1, n do
        key, at = parse(data, at)
        value = true
        if value_of then value, at = parse(data, at) end
        if key ~= nil then found[key] = value end
    end
    return found, at
end

local readers = {
    ["+"] = function(text, _, at) return {ok = text}, at end,
    ["-"] = function(text, _, at) return {err = text}, at end,
    [":"] = function(text, _, at) return tonumber(text), at end,
    ["$"] = function(text, data, at)
        local n = tonumber(text)
        if n < 0 then return false, at end
        return sub(data, at, at + n - 1), at + n + 2
    end,
    ["*"] = function(text, data, at)
        local n = tonumber(text)
        if n < 0 then return false, at end
        return several(data, at, n)
    end,
    ["_"] = function(_, _, at) return nil, at end,
    ["#"] = function(text, _, at) return text == "t", at end,
    [","] = function(text, _, at) return {double = tonumber(text)}, at end,
    ["("] = function(text, _, at) return {big_number = text}, at end,
    ["="] = function(text, data, at)
        local n = tonumber(text)
        return {verbatim_string = {format = sub(data, at, at + 2), string = sub(data, at + 4, at + n - 1)}}, at + n + 2
    end,
    ["|"] = function(text, data, at)        -- attributes: not for scripts
        local _, after = pairs_of(data, at, tonumber(text), true)
        return parse(data, after)
    end,
    ["%"] = function(text, data, at)
        local found, after = pairs_of(data, at, tonumber(text), true)
        return {map = found}, after
    end,
    ["~"] = function(text, data, at)
        local found, after = pairs_of(data, at, tonumber(text), false)
        return {set = found}, after
    end,
}

function parse(data, at)        -- the value that begins there, and where the next one does
    local stop = find(data, "\r\n", at, true)
    return readers[sub(data, at, at)](sub(data, at + 1, stop - 1), data, stop + 2)
end

resp.parse = parse

function resp.trimmed(text)     -- not by a pattern, which would look at n newlines n * n times
    local n = len(text)
    while n > 0 and (byte(text, n) == 10 or byte(text, n) == 13) do n = n - 1 end
    return sub(text, 1, n)
end

function resp.one_line(text)
    return replaced(resp.trimmed(text), "[\r\n]", " ")
end

local one_line = resp.one_line

local function bulk(text)
    return "$" .. len(text) .. "\r\n" .. text .. "\r\n"
end

local put

local function put_pairs(out, t, depth, sign, with_values)
    local head, n = #out + 1, 0
    out[head] = ""
    for key, value in next, t do
        n = n + 1
        put(out, key, depth)
        if with_values then put(out, value, depth) end
    end
    local three = resp.client == 3
    out[head] = (three and sign or "*") .. (with_values and not three and 2 * n or n) .. "\r\n"
end

local function put_table(out, t, depth)
    local client = resp.client
    local value = rawget(t, "err")
    if type(value) == "string" then
        out[#out + 1] = "-" .. one_line(value) .. "\r\n"
        return
    end
    value = rawget(t, "ok")
    if type(value) == "string" then
        out[#out + 1] = "+" .. one_line(value) .. "\r\n"
        return
    end
    value = rawget(t, "double")
    if type(value) == "number" then
        local text = format("%.17g", value)
        out[#out + 1] = client == 3 and "," .. text .. "\r\n" or bulk(text)
        return
    end
    value = rawget(t, "map")
    if type(value) == "table" then return put_pairs(out, value, depth, "%", true) end
    value = rawget(t, "set")
    if type(value) == "table" then return put_pairs(out, value, depth, "~", false) end
    value = rawget(t, "big_number")
    if type(value) == "string" then
        out[#out + 1] = client == 3 and "(" .. one_line(value) .. "\r\n" or bulk(one_line(value))
        return
    end
    value = rawget(t, "verbatim_string")
    if type(value) == "table" then
        local kind, text = rawget(value, "format"), rawget(value, "string")
        if type(kind) == "string" and type(text) == "string" then
            kind = sub(kind .. "   ", 1, 3)
            out[#out + 1] = client == 3 and "=" .. (len(text) + 4) .. "\r\n" .. kind .. ":" .. text .. "\r\n" or bulk(text)
            return
        end
    end
    local head, n = #out + 1, 0
    out[head] = ""
    while true do
        value = rawget(t, n + 1)
        if value == nil then break end
        n = n + 1
        put(out, value, depth)
    end
    out[head] = "*" .. n .. "\r\n"
end

function put(out, value, depth)
    local kind = type(value)
    if depth > MOST_NESTED then
        out[#out + 1] = "-ERR reached lua stack limit\r\n"
    elseif kind == "string" then
        out[#out + 1] = bulk(value)
    elseif kind == "number" then
        out[#out + 1] = format(":%d\r\n", value)
    elseif kind == "table" then
        put_table(out, value, depth + 1)
    elseif kind == "boolean" and resp.script == 3 then
        out[#out + 1] = resp.client == 3 and (value and "#t\r\n" or "#f\r\n") or value and ":1\r\n" or ":0\r\n"
    elseif kind == "boolean" and value then
        out[#out + 1] = ":1\r\n"
    else
        out[#out + 1] = resp.client == 3 and "_\r\n" or "$-1\r\n"
    end
end

function resp.encode(value)
    local out = {}
    put(out, value, 1)
    return concat(out)
end

return resp
